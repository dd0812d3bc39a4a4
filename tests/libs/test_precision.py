"""Which channels of In-Place ABN are saved in half types, and when they are found anew."""

import gc
from collections import defaultdict

import pytest
import torch
from torch import nn

from libs import InPlaceABN
from libs.modules import _ON_STREAM
from libs.precision import Affine, count_optimizer_steps, imprecise_channels


def test_elu_is_imprecise_near_its_floor():
    """e⁻ᶻ - 1 at z = bias - 2 scale; the bias itself where it is large beside the scale."""
    weight, bias = torch.ones(4), torch.tensor([-3.0, 0.0, 3.0, 9.0])
    layers = [Affine(weight, bias, 1e-5, kind) for kind in ("elu", "leaky_relu")]
    layers += [Affine(weight[:3], bias[:3], 1e-5, "identity"), Affine(weight, 9 * bias, 1e-5, "leaky_relu")]
    found = imprecise_channels(layers)
    assert [None if x is None else x.tolist() for x in found] == [[0, 3], [3], None, [0, 2, 3]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [True, False])
def test_imprecise_channels_follow_the_optimizer(kind, fused, monkeypatch):
    """As on a GPU: known for a state of the parameters, and found anew for all layers at once."""
    layers = [InPlaceABN(3, activation=activation) for activation in ("identity", "leaky_relu")]
    searches = []

    def search(layers):
        searches.append(len(layers))
        return imprecise_channels(layers)

    monkeypatch.setattr("libs.modules.imprecise_channels", search)
    monkeypatch.setattr("libs.modules._ON_STREAM", defaultdict(set))

    def known():
        found = [layer._known_channels(layer._affine(), "stream") for layer in layers]
        return [None if channels is None else channels.tolist() for channels in found]

    assert known() == known() == [None, None]
    assert searches == [1, 1]  # the first did not know the second yet
    biases = [layer.bias for layer in layers]
    optimizer = kind(biases, 10.0, fused=fused)
    for index, bias in enumerate(biases):
        bias.grad = -torch.eye(3)[index]
    optimizer.step()
    assert known() == known() == [[0], [1]]
    assert searches == [1, 1, 2]
    with torch.no_grad():
        biases[1].zero_()
    assert known() == [[0], None]
    assert searches == [1, 1, 2, 1]
    with torch.no_grad():
        layers[1].weight.mul_(0)
        layers[1].bias.fill_(1)
    assert known() == [[0], [0, 1, 2]]
    layers[0].bias = nn.Parameter(torch.full((3,), 9.0))
    assert known() == [[0, 1, 2], [0, 1, 2]]


def test_layers_that_are_gone_or_elsewhere_are_not_looked_at():
    layer, elsewhere, gone = InPlaceABN(3), InPlaceABN(3).to("meta"), InPlaceABN(3)
    stream = object()
    for each in (elsewhere, gone):
        _ON_STREAM[stream].add(each)
    del each, gone
    gc.collect()
    assert layer._known_channels(layer._affine(), stream) is None
    assert set(_ON_STREAM[stream]) == {layer, elsewhere}
    del _ON_STREAM[stream]


def test_only_what_an_optimizer_changes_counts_as_changed():
    """Two networks of one optimiser, the second's gradients taken after a step for the first."""
    count_optimizer_steps()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1)
    losses = [layer(torch.ones(1, 2).requires_grad_()).sum() for layer in (first, second)]
    for loss in losses:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_layers_of_different_eps():
    layers = [Affine(torch.zeros(1), torch.ones(1), eps, "identity") for eps in (1e-5, 1.0)]
    assert [None if x is None else x.tolist() for x in imprecise_channels(layers)] == [[0], None]
