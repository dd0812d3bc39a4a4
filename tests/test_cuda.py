"""What only a GPU can show: ``pytest -m cuda``."""

import pytest
import torch

from cc_attention import attention_weights, criss_cross_attention, reference
from libs import ABN
from networks import build_model
from utils.criterion import build_criterion

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch"),
]


def results(function, tensors, grad):
    out = function(*tensors)
    return out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 9), (1, 8, 16, 13, 26), (1, 2, 3, 1, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_attention_against_the_reference_in_double_precision(shape, memory_format, dtype):
    """Half types may have twice the error of the reference, which computes in fp32."""
    batch, reduced, channels, height, width = shape
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, c, height, width, device="cuda", dtype=dtype)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for c in (reduced, reduced, channels)
    ]
    grad = torch.randn(batch, channels, height, width, device="cuda", dtype=dtype)
    exact = results(
        reference.criss_cross_attention, [x.detach().double().requires_grad_() for x in tensors], grad
    )
    ours = results(criss_cross_attention, tensors, grad)
    theirs = results(reference.criss_cross_attention, tensors, grad)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        error, allowed = (got.double() - want).abs().max(), 2 * (other.double() - want).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * want.abs().max()


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
        loss = criterion({"out": on_device, "aux": on_device}, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)


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
