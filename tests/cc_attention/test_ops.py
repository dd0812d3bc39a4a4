"""The operator against a definition written with loops, and PyTorch's own checks of custom operators."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import cc_attention
from cc_attention import attention_weights, backend, criss_cross_attention, reference

SHAPES = [  # B, Cr, C, H, W
    (2, 3, 5, 7, 9),
    (1, 8, 16, 13, 26),  # more columns and rows than are worked on at a time
    (1, 2, 3, 1, 6),
    (1, 2, 3, 5, 1),
    (3, 1, 1, 1, 1),
]


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    memory_format: torch.memory_format = torch.channels_last,
    scale: float = 1.0,
    requires_grad: bool = False,
) -> list[Tensor]:
    batch, reduced, channels, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = []
    for c, factor in ((reduced, scale), (reduced, scale), (channels, 1.0)):
        x = torch.randn(batch, c, height, width, generator=generator, dtype=torch.float64) * factor
        tensors.append(x.to(dtype).contiguous(memory_format=memory_format).requires_grad_(requires_grad))
    return tensors


def by_loops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The sentence of the paper, position by position."""
    out = torch.zeros_like(value)
    batch, _, height, width = value.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                path = [(y, v) for v in range(width)] + [(g, x) for g in range(height) if g != y]
                energies = torch.stack([query[b, :, y, x] @ key[b, :, i, j] for i, j in path])
                values = torch.stack([value[b, :, i, j] for i, j in path])
                out[b, :, y, x] = energies.softmax(0) @ values
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
def test_equals_the_definition(function, shape):
    tensors = inputs(shape)
    torch.testing.assert_close(function(*tensors), by_loops(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_those_of_the_reference(shape, memory_format):
    ours = inputs(shape, memory_format=memory_format, requires_grad=True)
    theirs = inputs(shape, requires_grad=True)
    grad = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
    expected = torch.autograd.grad(reference.criss_cross_attention(*theirs), theirs, grad)
    actual = torch.autograd.grad(criss_cross_attention(*ours), ours, grad)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 2, 3, 3, 4), (1, 2, 2, 1, 3), (1, 1, 2, 14, 2)])
def test_first_and_second_derivatives(shape):
    tensors = inputs(shape, requires_grad=True)
    assert torch.autograd.gradcheck(criss_cross_attention, tensors)
    assert torch.autograd.gradgradcheck(criss_cross_attention, tensors)


def test_second_derivatives_where_only_some_inputs_need_them():
    query, key, value = inputs((1, 2, 3, 3, 4))
    key.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda k: criss_cross_attention(query, k, value), [key])


@pytest.mark.parametrize("key_of", [lambda q: q, lambda q: 2 * q, lambda q: q.flip(2)])
def test_gradients_that_are_to_be_differentiated_equal_those_that_are_not(key_of):
    """Where the inputs depend on each other, each path to the query counts once."""
    query, _, value = inputs((1, 3, 2, 4, 5), requires_grad=True)

    def gradient(function, create_graph):
        out = function(query, key_of(query), value)
        return torch.autograd.grad(out.square().sum(), query, create_graph=create_graph)[0]

    expected = gradient(reference.criss_cross_attention, create_graph=False)
    torch.testing.assert_close(gradient(criss_cross_attention, create_graph=False), expected)
    torch.testing.assert_close(gradient(criss_cross_attention, create_graph=True), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, ::2, 1:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.flip(1)[:, ::2],
    ],
)
def test_views_without_contiguous_memory(view):
    tensors = [view(x) for x in inputs((2, 4, 6, 6, 8))]
    torch.testing.assert_close(criss_cross_attention(*tensors), by_loops(*tensors))


def test_gradient_that_arrives_expanded():
    tensors = inputs((2, 2, 3, 4, 5), requires_grad=True)
    criss_cross_attention(*tensors).sum().backward()
    # A softmax's weights sum to one, so each value's gradient is the sum of the weights it was given.
    assert tensors[2].grad.sum().item() == pytest.approx(2 * 3 * 4 * 5)


def test_the_reference_codes_own_check():
    """Equal queries and keys spread the attention evenly: a value of 3 gives 3, and each value gives 1."""
    query = torch.full((2, 4, 5, 7), 1.0, requires_grad=True)
    value = torch.full((2, 3, 5, 7), 3.0, requires_grad=True)
    out = criss_cross_attention(query, query.detach().clone(), value)
    torch.testing.assert_close(out, torch.full_like(out, 3.0))
    out.sum().backward()
    torch.testing.assert_close(value.grad, torch.ones_like(value))
    torch.testing.assert_close(query.grad, torch.zeros_like(query))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0), (1, 2, 0, 4, 5), (1, 0, 2, 4, 5)]
)
def test_empty_maps(shape):
    tensors = inputs(shape, requires_grad=True)
    out = criss_cross_attention(*tensors)
    assert out.shape == tensors[2].shape
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in tensors)


def test_energies_far_beyond_the_range_of_exp():
    tensors = inputs((1, 4, 3, 6, 5), scale=100.0)  # energies of about ±2e4
    torch.testing.assert_close(criss_cross_attention(*tensors), by_loops(*tensors))
    single = [x.float().requires_grad_() for x in tensors]
    out = criss_cross_attention(*single)
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, *(x.grad for x in single)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_no_more_than_their_rounding(dtype):
    """Twice the error of the reference, which computes in fp32, is allowed, and one rounding."""
    tensors = inputs((2, 8, 16, 9, 11), dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    grad = torch.randn(2, 16, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype)

    def results(function, xs):
        out = function(*xs)
        return out, *torch.autograd.grad(out, xs, grad.to(out.dtype))

    wanted = results(reference.criss_cross_attention, exact)
    by_reference = results(reference.criss_cross_attention, tensors)
    ours = results(criss_cross_attention, tensors)
    for got, other, want in zip(ours, by_reference, wanted, strict=True):
        assert got.dtype == dtype
        allowed = 2 * (other.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


def test_attention_weights_layout():
    query, key, value = inputs((2, 3, 4, 5, 6))
    weights = attention_weights(query, key)
    assert weights.shape == (2, 5, 6, 11)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 6, dtype=torch.float64))
    for y in range(5):
        assert (weights[:, y, :, y] == 0).all()  # the own position, column part
        for x in range(6):
            assert (weights[:, y, x, 5 + x] > 0).all()  # the own position, row part
    column, row = weights[0, 3, 2, :5], weights[0, 3, 2, 5:]
    expected = value[0, :, :, 2] @ column + value[0, :, 3, :] @ row
    torch.testing.assert_close(criss_cross_attention(query, key, value)[0, :, 3, 2], expected)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 9), (1, 2, 3, 1, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(shape, memory_format):
    tensors = inputs(shape, torch.float32, memory_format, requires_grad=True)
    torch.library.opcheck(torch.ops.cc_attention.criss_cross_attention, tuple(tensors))
    plain = [x.detach() for x in tensors]
    out, lse = torch.ops.cc_attention.criss_cross_attention(*plain)
    torch.library.opcheck(
        torch.ops.cc_attention.criss_cross_attention_backward, (torch.randn_like(out), *plain, out, lse)
    )


def test_compile_in_one_graph_for_any_shape():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criss_cross_attention, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((2, 3, 5, 6, 7), (3, 3, 5, 9, 4), (2, 4, 6, 5, 8)):
        tensors = inputs(shape, torch.float32, requires_grad=True)
        out, expected = compiled(*tensors), criss_cross_attention(*tensors)
        torch.testing.assert_close(out, expected)
        for got, want in zip(
            torch.autograd.grad(out.square().sum(), tensors),
            torch.autograd.grad(expected.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_export_with_a_size_that_is_left_open():
    layer = cc_attention.CrissCrossAttention(16).eval()
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    program = torch.export.export(layer, (torch.randn(1, 16, 6, 7),), dynamic_shapes=({2: height, 3: width},))
    x = torch.randn(1, 16, 9, 4)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_threads_that_call_at_once_as_those_of_data_parallel():
    shapes = [(2, 3, 5, 17, 9), (1, 8, 16, 13, 26), (1, 2, 3, 1, 6), (2, 4, 33, 20, 20)]

    def gradients(shape):
        tensors = inputs(shape, torch.float32, requires_grad=True)
        return torch.autograd.grad(criss_cross_attention(*tensors).square().sum(), tensors)

    expected = [gradients(shape) for shape in shapes]
    with ThreadPoolExecutor(len(shapes)) as pool:
        for results in (list(pool.map(gradients, shapes)) for _ in range(5)):
            for got, want in zip(results, expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_autocast_leaves_double_precision_alone():
    tensors = inputs((1, 2, 3, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criss_cross_attention(*tensors).dtype == torch.float64


def test_meta_device():
    tensors = [x.to("meta") for x in inputs((2, 3, 5, 7, 9), torch.float32)]
    out = criss_cross_attention(*tensors)
    assert out.device.type == "meta" and out.shape == (2, 5, 7, 9)


def test_autocast_casts_to_its_dtype():
    query, key, value = inputs((1, 2, 3, 4, 5), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = criss_cross_attention(query.bfloat16(), key, value)
        expected = criss_cross_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
        assert attention_weights(query, key).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    # Autocast must not reach into the kernel, where it would undo the casts to fp32.
    assert torch.equal(out, criss_cross_attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q[0], k, v), ValueError, r"query must be \(B,C,H,W\); got shape \(3, 7, 9\)"),
        (lambda q, k, v: (q, k[:, :2], v), ValueError, r"\(2, 3, 7, 9\) and \(2, 2, 7, 9\)"),
        (lambda q, k, v: (q, k, v[:, :, :5]), ValueError, r"\(2, 3, 7, 9\) and \(2, 5, 5, 9\)"),
        (lambda q, k, v: (q, k, v[:1]), ValueError, r"\(1, 5, 7, 9\)"),
        (
            lambda q, k, v: (q, k.float(), v),
            TypeError,
            "key must have the query's dtype torch.float64; got torch.float32",
        ),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, "got torch.int32"),
        (
            lambda q, k, v: (q, k, v.to("meta")),
            ValueError,
            "value must be on the query's device cpu; got meta",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        criss_cross_attention(*change(*inputs((2, 3, 5, 7, 9))))


def test_backend_names_both_devices():
    assert "CPU: " in backend() and "CUDA: " in backend() and "\n" not in backend()


def test_random_shapes_and_layouts_for_a_few_seconds():
    """Draws until the time is over; what fails names its seed, so that it can be repeated."""
    end, seed = time.monotonic() + 3, 0
    while seed < 10 or time.monotonic() < end:
        rng = random.Random(seed)
        batch, reduced, channels = rng.choice((1, 2, 3)), rng.randint(0, 40), rng.randint(1, 150)
        height, width = rng.randint(1, 40), rng.randint(1, 40)
        layouts = [rng.choice(LAYOUTS) for _ in range(4)]
        generator = torch.Generator().manual_seed(seed)

        def draw(c, layout, batch=batch, height=height, width=width, generator=generator):
            return layout(torch.randn(batch, c, height, width, generator=generator, dtype=torch.float64))

        ours = [draw(c, layouts[i]).requires_grad_() for i, c in enumerate((reduced, reduced, channels))]
        grad = draw(channels, layouts[3])
        theirs = [x.detach().clone().requires_grad_() for x in ours]
        out, want = criss_cross_attention(*ours), reference.criss_cross_attention(*theirs)
        pairs = zip(
            (out, *torch.autograd.grad(out, ours, grad)),
            (want, *torch.autograd.grad(want, theirs, grad)),
            strict=True,
        )
        for got, expected in pairs:
            assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9), f"{seed=}"
        seed += 1


LAYOUTS = (
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    lambda x: torch.cat([x, x], dim=3).contiguous(memory_format=torch.channels_last)[..., ::2][
        ..., : x.shape[3]
    ],
    lambda x: x[:1].expand_as(x),
)
