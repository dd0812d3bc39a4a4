"""Channel dropout whose mask depends on the sample's key."""

import pytest
import torch
from torch import nn

from networks import build_model
from networks.layers import SampleDropout2d, uniform


def correlation(left, right):
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


def test_numbers_are_uniform_and_independent():
    """Of neighbouring keys, as positions might be, and of random ones."""
    for keys in (torch.arange(4000), torch.randint(0, 2**32, (4000,))):
        numbers = uniform(keys, 512)
        assert numbers.shape == (4000, 512)
        assert 0 <= numbers.min() < 1e-5
        assert 1 - 1e-5 < numbers.max() < 1
        assert float(numbers.mean()) == pytest.approx(0.5, abs=1e-3)
        assert float((numbers < 0.1).float().mean()) == pytest.approx(0.1, abs=1e-3)
        # As often for each key, and for each channel, as chance has it.
        for dim, count in ((1, 512), (0, 4000)):
            spread = (numbers < 0.1).float().mean(dim).std()
            assert float(spread) == pytest.approx((0.09 / count) ** 0.5, rel=0.15)
        for other in (
            uniform(keys, 512, stream=1),
            uniform(keys, 512, stream=1).roll(2, 1),
            uniform(keys + 1, 512),
            numbers.roll(1, 1),
            numbers.roll(1, 0),
        ):
            assert abs(correlation(numbers, other)) < 5e-3


def test_masks_depend_on_the_key_alone():
    layer, x = SampleDropout2d(0.3), torch.rand(6, 40, 3, 5) + 1
    keys = torch.tensor([7, 2**32 - 1, 7, 0, 1, 99])
    out = layer(x, keys)
    torch.testing.assert_close(
        torch.cat([layer(x[:2], keys[:2]), layer(x[2:], keys[2:])]), out, rtol=0, atol=0
    )
    kept = out != 0
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept.flatten(2).any(2), kept.flatten(2).all(2))  # whole channels
    torch.testing.assert_close(out[kept], (x / 0.7)[kept])
    assert torch.equal(layer.eval()(x, keys), x)


def test_without_keys_it_is_pytorchs():
    x = torch.rand(2, 40, 3, 5)
    torch.manual_seed(3)
    expected = nn.Dropout2d(0.3)(x)
    torch.manual_seed(3)
    assert torch.equal(SampleDropout2d(0.3)(x), expected)


def test_the_network_with_keys_needs_no_generator():
    torch.manual_seed(0)
    model = build_model(backbone="resnet18", num_classes=3).train()
    images, keys = torch.randn(2, 3, 33, 41), torch.tensor([5, 6])
    first, second, other = model(images, keys), model(images, keys), model(images, keys + 1)
    for head in ("out", "aux"):
        assert torch.equal(first[head], second[head])
        assert not torch.equal(first[head], other[head])


def test_nothing_is_kept_with_a_probability_of_1():
    x, keys = torch.ones(2, 3, 2, 2), torch.tensor([1, 2])
    assert torch.equal(SampleDropout2d(1.0)(x, keys), torch.zeros_like(x))


def test_the_networks_dropout_is_the_published_one():
    """A tenth of the channels, drawn by the two heads independently."""
    network = build_model(backbone="resnet18")
    head, auxiliary = network.head.dropout, network.auxiliary_head.dropout
    assert head.p == auxiliary.p == 0.1
    assert head.stream != auxiliary.stream
