"""Which normalisation is folded into which convolution."""

import pytest
import torch
from torch import nn

from libs import ABN
from networks import fold_norms
from networks.resnet import BasicBlock


def norm(channels):
    layer = ABN(channels, activation="identity")
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


class NormFirst(nn.Module):
    """bn1 comes before conv1, and conv2 has no normalisation of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)

    def forward(self, x):
        return self.conv1(self.bn1(x).relu())


class NormFirstBlock(BasicBlock):
    last_norm = nn.Identity()

    def branch(self, x):
        return self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class SharedConvolution(nn.Module):
    """One convolution with two normalisations."""

    norm_pairs = (("conv", "first"), ("conv", "second"))

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 1), norm(4), norm(4)

    def forward(self, x):
        return self.second(self.conv(self.first(self.conv(x))))


class SharedNorm(nn.Module):
    """One normalisation of two convolutions."""

    norm_pairs = (("first", "norm"), ("second", "norm"))

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x):
        return self.norm(self.second(self.norm(self.first(x))))


class ByPath(nn.Module):
    """A pair within a child, named by its path, and perhaps by the child as well."""

    norm_pairs = (("inner.0", "inner.1"),)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class ByPathAndByTheChild(ByPath):
    """The convolution of the child's own pair is used a second time, before another normalisation."""

    norm_pairs = (("inner.0", "norm"),)

    def __init__(self, inner):
        super().__init__(inner)
        self.norm = norm(4)

    def forward(self, x):
        return self.norm(self.inner[0](self.inner(x)))


class Backwards(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


def shared_convolution():
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(conv, norm(4), conv)


@pytest.mark.parametrize(
    ("make", "norms_left"),
    [
        (NormFirst, 1),
        (lambda: NormFirstBlock(4, 4, norm), 2),
        (lambda: BasicBlock(4, 4, norm), 0),
        (lambda: Backwards(nn.Conv2d(4, 4, 1), norm(4)), 1),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), norm(4)), 0),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), norm(4)), 0),
        (shared_convolution, 1),
        (SharedConvolution, 2),
        (SharedNorm, 1),
        (lambda: ByPath(nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))), 0),
        (lambda: ByPathAndByTheChild(nn.Sequential(nn.Conv2d(4, 4, 1), norm(4))), 2),
    ],
)
def test_folding_changes_no_output(make, norms_left):
    torch.manual_seed(0)
    model = make().double().eval()
    state = torch.get_rng_state()
    folded = fold_norms(model)
    assert torch.equal(torch.get_rng_state(), state)  # a run that is evaluated on its way draws as without
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert sum(isinstance(layer, ABN) for layer in folded.modules()) == norms_left
