"""The layer around the operator."""

import pytest
import torch

from cc_attention import CrissCrossAttention, criss_cross_attention


def test_parameters_are_the_references():
    layer = CrissCrossAttention(512)
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "gamma": (1,),
        "query_conv.weight": (64, 512, 1, 1),
        "query_conv.bias": (64,),
        "key_conv.weight": (64, 512, 1, 1),
        "key_conv.bias": (64,),
        "value_conv.weight": (512, 512, 1, 1),
        "value_conv.bias": (512,),
    }
    assert sum(x.numel() for x in layer.parameters()) == 328_321  # FACTS: cca


def test_starts_as_the_identity_and_adds_gamma_times_the_attention():
    layer, x = CrissCrossAttention(16), torch.randn(2, 16, 5, 7)
    assert torch.equal(layer(x), x)
    layer.gamma.data.fill_(0.5)
    attention = criss_cross_attention(layer.query_conv(x), layer.key_conv(x), layer.value_conv(x))
    torch.testing.assert_close(layer(x), x + 0.5 * attention)


def test_two_rounds_reach_every_position_and_one_does_not():
    layer = CrissCrossAttention(8).double()
    layer.gamma.data.fill_(1.0)
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    (once,) = torch.autograd.grad(layer(x)[0, :, 1, 2].sum(), x)
    (twice,) = torch.autograd.grad(layer(layer(x))[0, :, 1, 2].sum(), x)
    reached = (once != 0).any(dim=1)[0]
    path = torch.zeros(5, 6, dtype=torch.bool)
    path[1], path[:, 2] = True, True
    assert torch.equal(reached, path)
    assert (twice != 0).any(dim=1).all()


def test_too_few_channels():
    with pytest.raises(ValueError, match="at least 8; got 4"):
        CrissCrossAttention(4)
