"""What only a GPU can show of in-place ABN: ``pytest -m cuda``."""

import copy

import pytest
import torch

from libs import ABN, InPlaceABN, norm_relu
from libs.native import KERNELS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch"),
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["leaky_relu", "elu", "identity"]
FORMATS = [torch.contiguous_format, torch.channels_last]
STEPS = (
    "statistics",
    "merge_statistics",
    "normalize_",
    "normalize_relu_",
    "sums",
    "sums_add_relu",
    "gradient",
)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def layers_and_maps(kind, shape, dtype, activation, memory_format, affine=True):
    """A layer on the CPU, x and the gradient of its output; statistics and parameters fp64 or fp32."""
    torch.manual_seed(sum(shape))
    # A slope of 0.5 keeps apart what half types tell of z.
    layer = kind(shape[1], affine=affine, activation=activation, activation_param=0.5)
    layer.to(torch.promote_types(dtype, torch.float32))
    if affine:
        torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
        layer.weight.data[::2] *= -1
        torch.nn.init.uniform_(layer.bias, -0.5, 0.5)
    maps = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in "xg"]
    return layer, *(t.contiguous(memory_format=memory_format) for t in maps)


def step(layer, x, grad):
    """Forward and backward: y, dx, the running statistics, and the parameters' gradients."""
    x = x.clone().requires_grad_()
    y = layer(x * 1)  # overwrites a copy
    y.backward(grad)
    gradients = [p.grad for p in layer.parameters()]
    return [y.detach(), x.grad, layer.running_mean, layer.running_var, *gradients]


def check_close(got, want, dtype):
    for x, y in zip(got, want, strict=True):
        x, y = x.cpu().double(), y.cpu().double()
        assert (x - y).abs().max() <= TOLERANCE[dtype] * y.abs().max()


def test_kernels_serve():
    assert KERNELS.why_unusable() is None
    for name in STEPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"libs::{name}", "CUDA")


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (2, 64, 17, 17), (4, 256, 4, 4), (2, 1, 5, 4), (3, 8, 1, 1)])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_cpu(shape, memory_format, activation, dtype):
    layer, x, grad = layers_and_maps(InPlaceABN, shape, dtype, activation, memory_format)
    on_device = copy.deepcopy(layer).cuda()
    check_close(step(on_device, x.cuda(), grad.cuda()), step(layer, x, grad), dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_equals_abn(memory_format, affine, training):
    # In double precision no two roundings put a z on different sides of 0.
    shape, dtype = (8, 64, 97, 97), torch.float64
    layer, x, grad = layers_and_maps(InPlaceABN, shape, dtype, "leaky_relu", memory_format, affine)
    plain = ABN(64, affine=affine, activation_param=0.5).double()
    plain.load_state_dict(layer.state_dict())
    pair = [module.cuda().train(training) for module in (layer, plain)]
    check_close(*(step(module, x.cuda(), grad.cuda()) for module in pair), dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fused_relu_equals_the_cpu(memory_format, with_shortcut, dtype):
    layer, x, grad = layers_and_maps(InPlaceABN, (2, 40, 17, 9), dtype, "identity", memory_format)
    shortcut = x.flip(0).contiguous(memory_format=memory_format) if with_shortcut else None
    results = []
    for device in ("cuda", "cpu"):
        module, leaf = copy.deepcopy(layer).to(device), x.to(device).requires_grad_()
        added = None if shortcut is None else shortcut.to(device).requires_grad_()
        _, out = norm_relu(module, leaf * 1, added)
        out.backward(grad.to(device))
        gradients = [leaf.grad, module.weight.grad, module.bias.grad]
        results.append(
            [out.detach(), *gradients, module.running_var, *([] if added is None else [added.grad])]
        )
    check_close(*results, dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_variance_where_the_mean_is_large(memory_format):
    x = (torch.randn(8, 64, 97, 97, device="cuda") + 1000).contiguous(memory_format=memory_format)
    var = torch.ops.libs.statistics(x, None, None, 0.0)[64:128]
    exact = x.double().var((0, 2, 3), correction=0)
    theirs = torch.var(x, (0, 2, 3), correction=0)
    error, allowed = (((v - exact) / exact).abs().max() for v in (var, theirs))
    assert error <= max(2 * allowed, 1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_repeats_to_the_bit_and_on_any_stream(memory_format):
    layer, x, grad = layers_and_maps(InPlaceABN, (4, 40, 65, 65), torch.bfloat16, "elu", memory_format)
    layer, x, grad = layer.cuda(), x.cuda(), grad.cuda()
    expected = step(copy.deepcopy(layer), x, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # what ran on another stream would be early
        again = step(copy.deepcopy(layer), x * 1, grad * 1)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_a_cuda_graph(memory_format):
    layer, x, grad = layers_and_maps(InPlaceABN, (2, 24, 33, 17), torch.float16, "leaky_relu", memory_format)
    layer, x, grad = layer.cuda(), x.cuda(), grad.cuda()
    settings = (layer.eps, layer.activation, layer.activation_param)
    weight, bias = layer.weight.detach(), layer.bias.detach()

    def run():
        y = x.clone()
        statistics = torch.ops.libs.statistics(y, None, None, 0.0)
        torch.ops.libs.normalize_(y, statistics, weight, bias, *settings)
        sums, dweight = torch.ops.libs.sums(grad, y, weight, bias, *settings)
        dx = torch.ops.libs.gradient(grad, y, statistics, sums, weight, bias, *settings)
        return y, sums, dweight, dx

    run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(0.5).add_(1)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.parametrize(
    ("strides", "channels", "activation", "message"),
    [
        ((60, 20, 1, 4), 3, "elu", "contiguous or channels-last"),
        ((60, 20, 5, 1), 4, "elu", "one number a channel"),
        ((60, 20, 5, 1), 3, "gelu", "got gelu"),
    ],
)
def test_last_line_checks(strides, channels, activation, message):
    x = torch.zeros(120, device="cuda").as_strided((2, 3, 4, 5), strides)
    ones, weight = torch.ones(7, device="cuda"), torch.ones(channels, device="cuda")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.libs.normalize_(x, ones, weight, None, 1e-5, activation, 1.0)
