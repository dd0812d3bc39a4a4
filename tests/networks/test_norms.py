"""The network with each normalisation: the same numbers, and less memory in place."""

import copy

import pytest
import torch
from torch import nn

import libs
from benchmarks.attention import levels
from libs import ABN
from networks import build_model, fold_norms
from networks.resnet import BasicBlock, relu_conv, run_block_pair


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
def test_convolution_of_relu_holds_its_input_only(stride):
    conv, x = nn.Conv2d(3, 4, 3, stride).double(), torch.randn(2, 3, 7, 9, dtype=torch.float64)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = relu_conv(conv, x)
    assert {t.data_ptr() for t in saved} <= {x.data_ptr(), conv.weight.data_ptr()}
    torch.testing.assert_close(out, conv(x.relu()))
    wanted = (x, conv.weight, conv.bias)
    grad = torch.randn_like(out)
    actual, expected = (torch.autograd.grad(o, wanted, grad) for o in (out, conv(x.relu())))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_block_pair_is_one_after_the_other():
    torch.manual_seed(0)
    first, second = (BasicBlock(6, 6, lambda channels: ABN(channels, activation="identity")) for _ in "12")
    blocks = nn.ModuleList([first, second]).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    wanted = (x, *blocks.parameters())
    outs = run_block_pair(first, second, x), second(first(x))
    torch.testing.assert_close(*outs)
    for got, want in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in outs), strict=True):
        torch.testing.assert_close(got, want)


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
