"""Activations that are computed twice instead of being held."""

import pytest
import torch

from benchmarks.attention import levels
from networks import build_model


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


def test_nothing_is_special_in_inference():
    model = build_model(backbone="resnet18", num_classes=5, checkpoint_activations=True).eval()
    plain = build_model(backbone="resnet18", num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 33, 41)
    assert torch.equal(model(images)["out"], plain(images)["out"])
