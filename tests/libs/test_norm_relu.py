"""norm_relu: the fused step against its parts, and what it saves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from libs import ABN, InPlaceABN, fold, freeze, norm_relu
from libs.ops import implementation
from tests.libs.launches import launches

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 5, 7, 9), (2, 37, 19, 23), (4, 5, 11), (6, 5), (2, 64, 33, 31)]


def layer_of(channels, dtype, kind=InPlaceABN):
    torch.manual_seed(channels)
    layer = kind(channels, activation="identity").to(torch.promote_types(dtype, torch.float32))
    layer.weight.data.uniform_(0.3, 1.5).mul_(torch.randn(channels).sign())
    layer.bias.data.uniform_(-1, 1)
    return layer


def drawn(shape, dtype, channels_last, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return (x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x).to(dtype)


def by_parts(layer, x, shortcut):
    """The steps of the fused one, one after another."""
    z = layer(x)
    return z, F.threshold(z, 0.0, 0.0) if shortcut is None else F.relu(z + shortcut)


def results(function, layer, x, shortcut, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, shortcut) if t is not None]
    added = leaves[1] if len(leaves) == 2 else None
    z, out = function(layer, leaves[0] * 1, added)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out, [*leaves, *parameters], grad)
    return [z.detach(), out.detach(), *gradients, layer.running_mean, layer.running_var]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_its_parts(shape, with_shortcut, channels_last, dtype):
    """A run that uses it trains to the same weights."""
    x, grad, shortcut = (drawn(shape, dtype, channels_last, seed) for seed in range(3))
    grad = grad.masked_fill(grad.abs() < 0.1, 0.0)
    for training in (True, False):
        layers = [layer_of(shape[1], dtype).train(training) for _ in range(2)]
        pair = [
            results(function, layer, x, shortcut if with_shortcut else None, grad)
            for function, layer in zip((norm_relu, by_parts), layers, strict=True)
        ]
        assert all(torch.equal(got, want) for got, want in zip(*pair, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_first_derivatives(training, with_shortcut):
    layer = layer_of(5, torch.float64).train(training)
    x, shortcut = (drawn((2, 5, 3, 4), torch.float64, True, seed).requires_grad_() for seed in (3, 4))
    inputs = (x, shortcut, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(
        lambda x, shortcut, *_: norm_relu(layer, x * 1, shortcut if with_shortcut else None)[1], inputs
    )


@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_and_zero_has_no_gradient(dtype, with_shortcut):
    """As ReLU has it."""
    layer = layer_of(3, dtype).eval()
    with torch.no_grad():
        layer.bias.zero_()
    x = torch.ones(2, 3, 4, 5, dtype=dtype)
    x[0, 1, 2, 3] = torch.nan
    x[1] = 0
    x.requires_grad_()
    _, out = norm_relu(layer, x * 1, torch.zeros_like(x) if with_shortcut else None)
    assert out[0, 1, 2, 3].isnan()
    assert out.isnan().sum() == 1
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert not gradient[1].any()


def test_a_shortcut_in_another_memory_format():
    x, grad, shortcut = (drawn((2, 5, 7, 9), torch.float32, last, 5) for last in (True, True, False))
    pair = [
        results(function, layer_of(5, torch.float32), x, shortcut, grad) for function in (norm_relu, by_parts)
    ]
    assert all(torch.equal(got, want) for got, want in zip(*pair, strict=True))


def test_saves_z_and_the_shortcut_and_neither_sum_nor_relu():
    saved = []
    x, shortcut = (torch.randn(2, 5, 3, 4, requires_grad=True) * 1 for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        z, out = norm_relu(layer_of(5, torch.float32), x, shortcut)
    assert z.data_ptr() == x.data_ptr() != out.data_ptr()
    assert {t.data_ptr() for t in saved if t.numel() > 11} == {z.data_ptr(), shortcut.data_ptr()}
    assert not z.requires_grad


def test_autograd_notices_changes_and_misuse():
    x, shortcut = (torch.randn(2, 5, 3, 4, requires_grad=True) * 1 for _ in range(2))
    z, out = norm_relu(layer_of(5, torch.float32), x, shortcut)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    x = torch.randn(2, 5, 3, 4, requires_grad=True) * 1
    _, out = norm_relu(layer_of(5, torch.float32), x)
    with pytest.raises(RuntimeError, match="takes no part in the graph"):
        (x.sum() + out.sum()).backward()


@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize("own", [lambda x: x, lambda x: x.view_as(x), lambda x: x[1:]])
def test_views_and_a_shortcut_in_the_same_memory(own, with_shortcut):
    """relu(norm(x) + x): the norm overwrites what the addition wants."""
    start, results = torch.randn(3, 5, 3, 4, dtype=torch.float64, requires_grad=True), []
    for kind in (InPlaceABN, ABN):
        x = own(start * 1)
        out = norm_relu(layer_of(5, torch.float64, kind), x, x if with_shortcut else None)[1]
        results.append((out, *torch.autograd.grad(out.square().sum(), start)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "norm",
    [
        ABN(5, activation="identity"),
        InPlaceABN(5),  # another activation before the ReLU
        nn.BatchNorm2d(5),
        nn.Identity(),
        nn.Sequential(nn.BatchNorm2d(5), nn.LeakyReLU(0.1)),
    ],
    ids=lambda norm: type(norm).__name__,
)
@pytest.mark.parametrize("with_shortcut", [True, False])
def test_any_other_module(norm, with_shortcut):
    x, added = drawn((2, 5, 3, 4), torch.float32, True, 1), drawn((2, 5, 3, 4), torch.float32, True, 2)
    shortcut = added if with_shortcut else None
    for got, want in zip(
        norm_relu(norm, x.clone(), shortcut), by_parts(norm, x.clone(), shortcut), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_frozen_and_without_gradients():
    layer = layer_of(5, torch.float32)
    freeze(layer)
    layer.train()
    x = drawn((2, 5, 3, 4), torch.float32, True, 1)
    with torch.no_grad():
        want = F.relu(layer(x.clone()))
        assert torch.equal(norm_relu(layer, x.clone())[1], want)
    conv = nn.Conv2d(3, 5, 1)
    image = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(
        norm_relu(nn.Identity(), fold(conv, layer)(image))[1], norm_relu(layer, conv(image))[1]
    )


def test_transforms_compute_it_by_its_parts():
    layer, x = layer_of(5, torch.float64).eval(), drawn((2, 5, 3, 4), torch.float64, True, 1)
    got = torch.func.grad(lambda x: norm_relu(layer, x * 1, x)[1].sum())(x)
    want = torch.func.grad(lambda x: F.relu(ABN.forward(layer, x) + x).sum())(x)
    torch.testing.assert_close(got, want)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"InPlaceABN needs \(B,5,…\); got shape \(2, 4, 3, 3\)"):
        norm_relu(layer_of(5, torch.float32), torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        norm_relu(layer_of(5, torch.float32), torch.randn(2, 5, 6, 6)[:, :, ::2])


@pytest.mark.skipif(not implementation("cpu").startswith("C++"), reason="the PyTorch path has many")
@pytest.mark.parametrize("how", ["layer", "relu", "add_relu"])
def test_six_launches_for_a_layer_and_what_follows_it(how):
    layer, leaf, grad = layer_of(8, torch.float32), *(torch.randn(2, 8, 5, 6) for _ in range(2))
    x = leaf.requires_grad_().clone()
    shortcut = torch.randn(2, 8, 5, 6, requires_grad=True) if how == "add_relu" else None
    leaves, outs = [leaf, *layer.parameters()] + ([] if shortcut is None else [shortcut]), []

    def forward():
        outs.append(layer(x) if how == "layer" else norm_relu(layer, x, shortcut)[1])

    found = launches(forward)
    assert len(found) == 3, found
    found = launches(lambda: torch.autograd.grad(outs[0], leaves, grad))
    assert len(found) == 3, found
