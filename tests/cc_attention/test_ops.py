"""The operator's numbers: against a definition written with loops, and its derivatives.

test_native.py runs this file for every implementation of the CPU.
"""

import itertools
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cc_attention import attention_weights, criss_cross_attention, reference
from tests.cc_attention.definition import CLIPS, EMPTY, IMAGES, by_loops, inputs

SHAPES = [*IMAGES, *CLIPS]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
def test_equals_the_definition(function, shape):
    tensors = inputs(shape)
    torch.testing.assert_close(function(*tensors), by_loops(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, None])
def test_gradients_equal_those_of_the_reference(shape, memory_format):
    ours = inputs(shape, memory_format=memory_format, requires_grad=True)
    theirs = inputs(shape, requires_grad=True)
    grad = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
    expected = torch.autograd.grad(reference.criss_cross_attention(*theirs), theirs, grad)
    actual = torch.autograd.grad(criss_cross_attention(*ours), ours, grad)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "shape", [(2, 2, 3, 3, 4), (1, 2, 2, 1, 3), (1, 1, 2, 14, 2), (1, 2, 2, 3, 2, 3), (2, 1, 2, 2, 1, 2)]
)
def test_first_and_second_derivatives(shape):
    tensors = inputs(shape, requires_grad=True)
    assert torch.autograd.gradcheck(criss_cross_attention, tensors)
    assert torch.autograd.gradgradcheck(criss_cross_attention, tensors, fast_mode=True)


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


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:, ::2, 1:],
        lambda x: x.transpose(2, 4),
        lambda x: x[:, :, :1].expand(-1, -1, 4, -1, -1),
        lambda x: x.flip(1)[:, ::2],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # (B,T,C,H,W), as folded frames are
    ],
)
def test_views_of_clips_without_contiguous_memory(view):
    tensors = [view(x) for x in inputs((2, 4, 6, 3, 4, 5))]
    torch.testing.assert_close(criss_cross_attention(*tensors), by_loops(*tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [criss_cross_attention, reference.criss_cross_attention])
def test_a_clip_of_one_frame_is_an_image_to_the_bit(function, dtype):
    images = inputs((2, 9, 17, 11, 13), dtype, requires_grad=True)
    clips = [x.detach().unsqueeze(2).requires_grad_() for x in images]
    out, expected = function(*clips), function(*images)
    assert torch.equal(out.squeeze(2), expected)
    gradients = torch.autograd.grad(out.square().sum(), clips)
    for got, want in zip(gradients, torch.autograd.grad(expected.square().sum(), images), strict=True):
        assert torch.equal(got.squeeze(2), want)
    weights, want = (attention_weights(*xs[:2]) for xs in (clips, images))
    assert torch.equal(weights[:, 0, ..., 1:], want)
    assert (weights[..., 0] == 0).all()


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


@pytest.mark.parametrize("shape", EMPTY)
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


@pytest.mark.parametrize("sizes", [(9, 11), (3, 5, 6)])
@pytest.mark.parametrize("energy", [1e2, 1e4])
def test_weights_sum_to_1_however_large_the_energies(energy, sizes):
    query, key, value = inputs((2, 3, 4, *sizes), torch.float32)
    query[:, 0] = key[:, 0] = energy**0.5
    out = criss_cross_attention(query, key, torch.ones_like(value))
    torch.testing.assert_close(out, torch.ones_like(value), rtol=0, atol=1e-6)


SPOILED = {  # what becomes -inf
    "one query": lambda q, k: [q[0, 0, ..., 0, 0]],
    "a row of keys": lambda q, k: [k[0, 0, ..., 1, :]],
    "a column of keys": lambda q, k: [k[0, 0, ..., 1]],
    "a row and a column of keys": lambda q, k: [k[0, 0, ..., 1, :], k[0, 0, ..., 1]],
    "a frame of keys": lambda q, k: [k[0, 0, :1]],
    "all keys": lambda q, k: [k],
    "all keys but one": lambda q, k: [k.view(-1)[1:]],
}


@pytest.mark.parametrize("sizes", [(4, 5), (3, 4, 5)])
@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_energies_of_minus_infinity(sizes, spoiled, dtype):
    """They weigh nothing beside finite ones; a position that has no others is NaN, as in the reference."""
    query, key = torch.ones(2, 1, 1, *sizes, dtype=dtype)
    for part in SPOILED[spoiled](query, key):
        part.fill_(-torch.inf)
    value, grad = inputs((1, 3, 3, *sizes), dtype)[:2]

    def results(function):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, grad)

    expected = results(reference.criss_cross_attention)
    assert spoiled not in ("one query", "all keys") or expected[0].isnan().any()
    tolerance = 1e-5 if dtype in (torch.float64, torch.float32) else 2e-2
    for got, want in zip(results(criss_cross_attention), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("sizes", [(9, 11), (3, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_lose_no_more_than_their_rounding(dtype, sizes):
    """Twice the error of the reference, which computes in fp32, is allowed, and one rounding."""
    tensors = inputs((2, 8, 16, *sizes), dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    grad = torch.randn(2, 16, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)

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


@pytest.mark.parametrize("sizes", [(9, 11), (3, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_types_gradients_see_the_rounded_output(dtype, sizes):
    """δ = grad · out (docs/op.md). Keys and values far from zero show how much its rounding counts.

    With δ off by r, dquery is off by -r Σ P key and dkey by -Pᵀ (r query); the formula has no such error.
    """
    query, key, value = inputs((2, 8, 16, *sizes), dtype)
    leaves = [query.requires_grad_(), (key + 8).requires_grad_(), (value + 8).requires_grad_()]
    grad = torch.randn(2, 16, *sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]

    def gradients(function, xs):
        return torch.autograd.grad(function(*xs), xs[:2], grad.to(xs[0].dtype))

    out = reference.criss_cross_attention(*exact)
    off = (grad.double() * (out.to(dtype).double() - out)).sum(1, keepdim=True)
    keys = exact[1].detach().requires_grad_()
    mean_of_keys = reference.criss_cross_attention(*exact[:2], keys)
    shifts = off * mean_of_keys, torch.autograd.grad(mean_of_keys, keys, off * exact[0])[0]
    wanted = gradients(reference.criss_cross_attention, exact)
    by_reference = gradients(reference.criss_cross_attention, leaves)
    ours = gradients(criss_cross_attention, leaves)
    for got, other, want, shift in zip(ours, by_reference, wanted, shifts, strict=True):
        assert shift.abs().max() > torch.finfo(dtype).eps * want.abs().max()
        allowed = 2 * (other.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got.double() - (want - shift)).abs().max() <= allowed


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


def test_attention_weights_layout_of_a_clip():
    query, key, value = inputs((2, 3, 4, 5, 3, 4))
    weights = attention_weights(query, key)
    assert weights.shape == (2, 5, 3, 4, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5, 3, 4, dtype=torch.float64))
    for t, y, x in itertools.product(range(5), range(3), range(4)):
        own = weights[:, t, y, x, [t, 5 + y, 8 + x]]
        assert (own[:, :2] == 0).all()  # time and column
        assert (own[:, 2] > 0).all()  # row
    time, column, row = weights[1, 3, 2, 1].split([5, 3, 4])
    expected = value[1, :, :, 2, 1] @ time + value[1, :, 3, :, 1] @ column + value[1, :, 3, 2] @ row
    torch.testing.assert_close(criss_cross_attention(query, key, value)[1, :, 3, 2, 1], expected)


def test_threads_that_call_at_once_as_those_of_data_parallel():
    shapes = [(2, 3, 5, 17, 9), (1, 8, 16, 13, 26), (1, 2, 3, 1, 6), (2, 4, 33, 20, 20), (2, 3, 5, 4, 7, 6)]

    def gradients(shape):
        tensors = inputs(shape, torch.float32, requires_grad=True)
        return torch.autograd.grad(criss_cross_attention(*tensors).square().sum(), tensors)

    expected = [gradients(shape) for shape in shapes]
    with ThreadPoolExecutor(len(shapes)) as pool:
        for results in (list(pool.map(gradients, shapes)) for _ in range(5)):
            for got, want in zip(results, expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_random_shapes_and_layouts_for_a_few_seconds():
    """Draws until the time is over; what fails names its seed, so that it can be repeated."""
    end, seed = time.monotonic() + 3, 0
    while seed < 10 or time.monotonic() < end:
        rng = random.Random(seed)
        batch, reduced, channels = rng.choice((1, 2, 3)), rng.randint(0, 40), rng.randint(1, 150)
        if rng.random() < 0.5:
            sizes = [rng.randint(1, 40) for _ in "hw"]
        else:
            sizes = [rng.randint(1, 12) for _ in "thw"]
        layouts = [rng.choice(LAYOUTS) for _ in range(4)]
        generator = torch.Generator().manual_seed(seed)

        def draw(c, layout, batch=batch, sizes=sizes, generator=generator):
            return layout(torch.randn(batch, c, *sizes, generator=generator, dtype=torch.float64))

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


def in_channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = (
    lambda x: x,
    in_channels_last,
    lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    lambda x: in_channels_last(torch.cat([x, x], dim=-1))[..., ::2][..., : x.shape[-1]],
    lambda x: x[:1].expand_as(x),
)
