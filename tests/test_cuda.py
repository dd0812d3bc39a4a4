"""What only a GPU can show: ``pytest -m cuda``."""

import pytest
import torch

from cc_attention import attention_weights, criss_cross_attention, reference
from libs import ABN
from networks import build_model
from training.criterion import build_criterion

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch"),
]


def results(function, tensors, grad):
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))


def in_its_own_dtype(query, key, value):
    """The formula as PyTorch computes it when nobody asks for fp32: the yardstick for half types."""
    sizes = list(query.shape[2:])
    row = torch.einsum("bc...hw,bc...hv->b...hwv", query, key)
    column = torch.einsum("bc...hw,bc...gw->b...hwg", query, key)
    own = torch.eye(sizes[-2], dtype=torch.bool, device=query.device).unsqueeze(1)
    energies = [column.masked_fill(own, float("-inf")), row]
    if len(sizes) == 3:
        time = torch.einsum("bcthw,bcshw->bthws", query, key)
        own = torch.eye(sizes[0], dtype=torch.bool, device=query.device)[:, None, None]
        energies.insert(0, time.masked_fill(own, float("-inf")))
    *time, column, row = torch.cat(energies, dim=-1).softmax(dim=-1).split(sizes, dim=-1)
    out = torch.einsum("b...hwg,bc...gw->bc...hw", column, value)
    out = out + torch.einsum("b...hwv,bc...hv->bc...hw", row, value)
    return out + torch.einsum("bthws,bcshw->bcthw", time[0], value) if time else out


def drawn(shape, dtype, channels_last=True):
    """Query, key, value and the gradient of the result."""
    batch, reduced, channels, *sizes = shape
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    maps = [
        torch.randn(batch, c, *sizes, device="cuda", generator=generator, dtype=torch.float64)
        for c in (reduced, reduced, channels, channels)
    ]
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = torch.channels_last if len(sizes) == 2 else torch.channels_last_3d
    # Energies of a spread of 2 or so, whatever the number of channels.
    maps = [x * 2 / reduced**0.5 if i == 0 else x for i, x in enumerate(maps)]
    *tensors, grad = (x.to(dtype).contiguous(memory_format=memory_format) for x in maps)
    return [x.requires_grad_() for x in tensors], grad


SHAPES = [
    (2, 3, 5, 7, 9),
    (1, 8, 16, 13, 26),
    (1, 2, 3, 1, 6),
    (1, 16, 40, 130, 270),  # lines longer than a segment
    (2, 64, 512, 97, 97),
    (2, 3, 5, 4, 7, 9),  # clips
    (1, 16, 40, 130, 5, 6),
    (1, 64, 512, 5, 49, 49),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_attention_against_the_reference_in_double_precision(shape, channels_last, dtype):
    """No more than twice the error that PyTorch has in the same dtype, and some roundings.

    PyTorch has none in fp64, where its formula is the reference itself. In fp32 the gradients' weights come
    from the stored lse, whose rounding counts once for each unit of its size.
    """
    tensors, grad = drawn(shape, dtype, channels_last)
    exact = results(
        reference.criss_cross_attention, [x.detach().double().requires_grad_() for x in tensors], grad
    )
    ours = results(criss_cross_attention, tensors, grad)
    theirs = results(in_its_own_dtype, tensors, grad)
    rounding = [1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps] * 4
    if dtype == torch.float32:
        lse = torch.ops.cc_attention.criss_cross_attention(*(x.detach() for x in tensors))[1]
        rounding[1:] = [rounding[0] * max(1.0, lse.abs().max().item())] * 3
    for got, other, want, share in zip(ours, theirs, exact, rounding, strict=True):
        error, allowed = (got.double() - want).abs().max(), 2 * (other.double() - want).abs().max()
        assert error <= allowed + share * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_of_one_frame_is_an_image_to_the_bit(dtype):
    tensors, grad = drawn((2, 16, 40, 33, 65), dtype)
    clips = [x.detach().unsqueeze(2).requires_grad_() for x in tensors]
    expected = results(criss_cross_attention, tensors, grad)
    for got, want in zip(results(criss_cross_attention, clips, grad.unsqueeze(2)), expected, strict=True):
        assert torch.equal(got.squeeze(2), want)


@pytest.mark.parametrize("sizes", [(4, 5), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_energies_of_minus_infinity(sizes, dtype):
    """They weigh nothing beside finite ones; a position that has no others is NaN, as in the reference."""
    query, key = torch.ones(2, 1, 1, *sizes, device="cuda", dtype=dtype)
    key[..., 1, :] = key[0, 0, ..., 1] = -torch.inf
    value = torch.randn(1, 3, *sizes, device="cuda").to(dtype)
    expected = reference.criss_cross_attention(query, key, value)
    torch.testing.assert_close(
        criss_cross_attention(query, key, value), expected, rtol=0.02, atol=0.02, equal_nan=True
    )


def relative_errors(results, exact):
    pairs = zip(results, exact, strict=True)
    return [((x.double() - want).abs().max() / want.abs().max()).item() for x, want in pairs]


def test_tf32_where_pytorch_uses_it_and_only_there():
    tensors, grad = drawn((2, 64, 512, 97, 97), torch.float32)
    exact = results(
        reference.criss_cross_attention, [x.detach().double().requires_grad_() for x in tensors], grad
    )
    before, errors = torch.get_float32_matmul_precision(), {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            ours, theirs = (results(f, tensors, grad) for f in (criss_cross_attention, in_its_own_dtype))
            errors[precision] = [
                [
                    ((x.double() - want).abs().max() / want.abs().max()).item()
                    for x, want in zip(xs, exact, strict=True)
                ]
                for xs in (ours, theirs)
            ]
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, theirs in errors.values():
        assert all(error <= 2 * other + 1e-6 for error, other in zip(ours, theirs, strict=True))
    assert max(errors["highest"][0]) < 2e-5


def test_attention_repeats_to_the_bit_and_on_any_stream():
    tensors, grad = drawn((2, 16, 40, 33, 65), torch.bfloat16)
    expected = results(criss_cross_attention, tensors, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # what ran on another stream would be early
        again = results(criss_cross_attention, [x * 1 for x in tensors], grad * 1)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(x, y) for x, y in zip(expected, again, strict=True))


def test_attention_in_a_cuda_graph():
    (query, key, value), grad = drawn((1, 8, 16, 13, 26), torch.float16)
    tensors = [x.detach() for x in (query, key, value)]
    operator = torch.ops.cc_attention.criss_cross_attention
    backward = torch.ops.cc_attention.criss_cross_attention_backward

    def step():
        out, lse = operator(*tensors)
        return out, *backward(grad, *tensors, out, lse)

    step()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in tensors:
        x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


def test_second_derivatives():
    tensors = [torch.randn(1, 2, 3, 4, device="cuda", dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    assert torch.autograd.gradgradcheck(criss_cross_attention, tensors)


def test_opcheck_and_weights():
    tensors = tuple(torch.randn(1, 4, 5, 6, device="cuda", requires_grad=True) for _ in "qkv")
    torch.library.opcheck(torch.ops.cc_attention.criss_cross_attention, tensors)
    weights = attention_weights(*tensors[:2])
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5, 6, device="cuda"))


@pytest.mark.parametrize("keep", [0, 640, 10**6])
def test_ohem_stays_on_the_device_and_equals_the_cpu(keep):
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, 5, 9, 11), torch.randint(0, 5, (2, 65, 81), dtype=torch.uint8)
    target[:, :20] = 255
    criterion = build_criterion(ohem=True, ohem_thres=0.3, ohem_keep=keep)
    expected = criterion({"out": logits, "aux": logits}, target)
    on_device, target = logits.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")  # any wait for the device raises
    try:
        losses = criterion({"out": on_device, "aux": on_device}, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=1e-4, atol=1e-5)


def test_abn_equals_the_cpu():
    layer, x = ABN(5), torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(ABN(5).cuda()(x.cuda()).cpu(), layer(x), rtol=1e-4, atol=1e-5)


def test_network_equals_the_cpu():
    torch.manual_seed(0)
    model = build_model(num_classes=4, backbone="resnet18").eval()
    model.head.cca.gamma.data.fill_(0.5)
    images = torch.randn(2, 3, 65, 49)
    with torch.inference_mode():
        expected = model(images)["out"]
        model.cuda().to(memory_format=torch.channels_last)
        out = model(images.cuda().contiguous(memory_format=torch.channels_last))["out"].cpu()
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)  # convolutions use TF32
