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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_layer_of_a_2d_checkpoint_takes_clips(dtype):
    image_layer, layer = CrissCrossAttention(16).to(dtype), CrissCrossAttention(16).to(dtype)
    image_layer.gamma.data.fill_(0.5)
    layer.load_state_dict(image_layer.state_dict())
    x = torch.randn(2, 16, 3, 5, 4, dtype=dtype, requires_grad=True)
    # The convolutions see each frame alone, the attention the whole clip.
    maps = [
        torch.stack([conv(frame) for frame in x.unbind(2)], dim=2)
        for conv in (layer.query_conv, layer.key_conv, layer.value_conv)
    ]
    torch.testing.assert_close(layer(x), x + 0.5 * criss_cross_attention(*maps))
    last = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(layer(last), layer(x))
    assert layer(last).is_contiguous(memory_format=torch.channels_last_3d)
    one = x[:, :, :1]
    assert torch.equal(layer(one).squeeze(2), image_layer(one.squeeze(2)))


def test_two_rounds_reach_a_shared_coordinate_and_three_the_whole_clip():
    layer = CrissCrossAttention(8).double()
    layer.gamma.data.fill_(1.0)
    x = torch.randn(1, 8, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    away = torch.meshgrid(*((torch.arange(n) != 1).int() for n in (3, 4, 5)), indexing="ij")
    y, differing = x, sum(away)  # in how many coordinates
    for rounds in (1, 2, 3):
        y = layer(y)
        (gradient,) = torch.autograd.grad(y[0, :, 1, 1, 1].sum(), x, retain_graph=True)
        assert torch.equal((gradient != 0).any(dim=1)[0], differing <= rounds)


def test_too_few_channels():
    with pytest.raises(ValueError, match="at least 8; got 4"):
        CrissCrossAttention(4)
