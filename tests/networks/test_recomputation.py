"""Activation checkpointing: less memory, the same numbers."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.attention import levels
from libs import ABN
from networks import build_model
from networks.recomputation import recompute_in_backward
from networks.resnet import BasicBlock, Stage
from tests.libs.test_synchronized import in_threads


@pytest.mark.parametrize("norm", ["abn", "inplace_abn"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_the_same_bits_with_less_memory(norm, backbone):
    """Gradients and statistics; the latter are not updated by the second computation."""
    images = torch.randn(2, 3, 49, 65).contiguous(memory_format=torch.channels_last)
    keys, results, held = torch.tensor([3, 4]), [], []
    for twice in (False, True):
        torch.manual_seed(0)
        model = build_model(backbone=backbone, num_classes=5, norm=norm, checkpoint_activations=twice)
        model.to(memory_format=torch.channels_last).train()

        def forward(model=model):
            outputs = model(images, keys)
            return outputs["out"].square().mean() + outputs["aux"].square().mean()

        held.append(levels(forward)[-1])
        forward().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
        assert all(layer.momentum == 0.1 for layer in model.modules() if hasattr(layer, "momentum"))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert held[1] < 0.7 * held[0]


def test_replicas_in_threads(replicate):
    """Synchronised layers wait for each other in the second computation too."""
    images, results = torch.randn(2, 2, 3, 33, 33, generator=torch.Generator().manual_seed(0)), []
    for twice in (False, True):
        torch.manual_seed(0)
        model = build_model(backbone="resnet18", num_classes=5, norm="sync", checkpoint_activations=twice)
        replicas = replicate(model.train(), 2)

        def loss(replica, x):
            outputs = replica(x, torch.tensor([1, 2]))
            return outputs["out"].square().mean() + outputs["aux"].square().mean()

        losses = in_threads([partial(loss, *pair) for pair in zip(replicas, images, strict=True)])
        assert in_threads([x.backward for x in losses]) == [None, None]
        results.append([*losses, *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_what_several_layers_saved_is_computed_once_in_each_backward_pass():
    x = torch.randn(3, 4, requires_grad=True)
    between, calls = x.detach() * 2, []

    def compute():
        calls.append(None)
        return x.detach() * 2

    with recompute_in_backward(between, compute):
        loss = (between * x).sum() + (between * x.exp()).sum()
    for passes in (1, 2):
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(grad, 2 * x * (1 + x.exp()))
        assert len(calls) == passes


def test_nothing_is_special_in_inference():
    model = build_model(backbone="resnet18", num_classes=5, checkpoint_activations=True).eval()
    plain = build_model(backbone="resnet18", num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 33, 41)
    assert torch.equal(model(images)["out"], plain(images)["out"])


def test_function_transforms_of_a_network():
    model = build_model(backbone="resnet18", num_classes=5).double().eval()
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64, requires_grad=True)

    def loss(images):
        return model(images)["out"].square().mean()

    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])


class Noisy(BasicBlock):
    def branch(self, x):
        return F.dropout2d(super().branch(x), 0.5)


def test_dropout_in_a_recomputed_stage_draws_one_mask():
    """The gradient of sum(x) is 1 wherever the drawn mask let it pass; of another mask it would differ."""
    stage = Stage(*(Noisy(6, 6, lambda channels: ABN(channels, activation="identity")) for _ in range(3)))
    stage.double().train()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    results = []
    for stage.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        x.requires_grad_().grad = None
        out = stage(x)
        drawn_after = torch.rand(3)  # before the backward pass, which must not disturb the generator either
        out.square().sum().backward()
        results.append((out, x.grad, drawn_after, torch.rand(3)))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_plain_batch_norm_in_a_recomputed_stage_updates_its_statistics_once():
    buffers = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        stage = Stage(*(BasicBlock(4, 4, nn.BatchNorm2d) for _ in range(2))).train()
        stage.checkpoint_activations = recomputed
        stage(torch.randn(2, 4, 5, 7)).sum().backward()
        buffers.append(list(stage.buffers()))
        norms = [layer for layer in stage.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert {(layer.momentum, int(layer.num_batches_tracked)) for layer in norms} == {(0.1, 1)}
    for plain, twice in zip(*buffers, strict=True):
        assert torch.equal(plain, twice)
