"""The network with each normalisation: the same numbers, and less memory in place."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libs
from benchmarks.attention import levels
from libs import ABN, InPlaceABN
from networks import build_model, fold_norms
from networks.resnet import BasicBlock, Bottleneck, norm_relu_conv, run_block_pair


def lively(model):
    """Statistics and parameters as after some training: none is at its neutral start."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, ABN):
            layer.weight.data.normal_()
            layer.bias.data.normal_(0, 0.3)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    model.head.cca.gamma.data.fill_(0.3)
    return model


def step(model, images):
    torch.manual_seed(1)  # of dropout
    outputs = model(images)
    loss = outputs["out"].square().mean() + outputs["aux"].square().mean()
    return outputs["out"], dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_in_place_gives_the_numbers_of_plain_normalisation(backbone):
    plain = lively(build_model(backbone=backbone, norm="abn", num_classes=5).double())
    inplace = build_model(backbone=backbone, num_classes=5).double()
    inplace.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 65, 49, dtype=torch.float64)
    expected, expected_gradients = step(plain, images)
    actual, gradients = step(inplace.to(memory_format=torch.channels_last), images)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for name, want in expected_gradients.items():
        # A bias before a normalisation has no gradient but rounding.
        torch.testing.assert_close(gradients[name], want, rtol=1e-7, atol=1e-9 * (1 + want.abs().max()))


def test_in_place_holds_less():
    """By the allocator's own account, what the forward pass leaves for the backward pass."""
    images = torch.randn(2, 3, 129, 129)
    held = {}
    for norm in ("abn", "inplace_abn"):
        model = build_model(backbone="resnet50", norm=norm).to(memory_format=torch.channels_last)
        held[norm] = levels(lambda model=model: model(images))[-1]
    assert held["inplace_abn"] < 0.8 * held["abn"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [ABN, InPlaceABN, nn.BatchNorm2d, nn.Identity])
def test_convolution_of_relu_holds_no_more_than_its_normalisation(kind, stride):
    torch.manual_seed(0)
    norm = kind(3, activation="identity") if issubclass(kind, ABN) else kind(3)
    layers = nn.ModuleList([norm, nn.Conv2d(3, 4, 3, stride)]).double()
    norm, conv = layers
    leaf = torch.randn(2, 3, 7, 9, dtype=torch.float64, requires_grad=True)
    x, saved = leaf * 1, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = norm_relu_conv(norm, x, conv)
    large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert len(large) <= (1 if kind in (InPlaceABN, nn.Identity) else 2)  # the others save their input
    wanted = (leaf, *layers.parameters())
    grad = torch.randn_like(out)
    want = conv(norm(leaf * 1).relu())
    torch.testing.assert_close(out, want)
    actual, expected = (torch.autograd.grad(o, wanted, grad) for o in (out, want))
    for got, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("kind", [ABN, InPlaceABN, "folded", "compiled"])
def test_a_block_pair_is_one_after_the_other(block, kind):
    torch.manual_seed(0)
    norm = ABN if kind == "folded" else InPlaceABN if kind == "compiled" else kind
    blocks = nn.ModuleList(
        block(8, 8 // block.expansion, lambda channels: norm(channels, activation="identity")) for _ in "12"
    )
    blocks.double()
    if kind == "folded":
        blocks = fold_norms(blocks)
    first, second = blocks
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64, requires_grad=True)
    wanted = (x, *(p for p in blocks.parameters() if p.requires_grad))
    with patch("torch.compiler.is_compiling", lambda: kind == "compiled"):
        outs = run_block_pair(first, second, x), second(first(x))
    plain = F.relu(second.last_norm(second.branch(y := F.relu(first.last_norm(first.branch(x)) + x))) + y)
    for out in outs:
        torch.testing.assert_close(out, plain)
    results = [torch.autograd.grad(out.square().sum(), wanted) for out in (*outs, plain)]
    for gradients in zip(*results, strict=True):
        for got in gradients[:2]:
            torch.testing.assert_close(got, gradients[2])


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_folded_network_gives_the_same_logits(backbone):
    model = lively(build_model(backbone=backbone, num_classes=5)).eval()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(1, 3, 65, 49)
    with torch.inference_mode():
        folded = fold_norms(model)
        expected, actual = model(images)["out"], folded(images)["out"]
    assert not any(isinstance(layer, ABN) for layer in folded.modules())
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_plain_batch_norm_network_gives_the_same_logits():
    model = lively(build_model(backbone="resnet18", num_classes=5)).eval()
    plain = libs.replace_by_batch_norm(copy.deepcopy(model))
    assert not any(isinstance(layer, ABN) for layer in plain.modules())
    images = torch.randn(1, 3, 65, 49)
    with torch.inference_mode():
        expected, actual = model(images)["out"], plain(images)["out"]
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
