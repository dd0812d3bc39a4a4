"""Channels of which InPlaceABN saves its input in half types, because y does not tell it precisely enough.

x̂ = (φ⁻¹(y) - bias) / (|weight| + eps) magnifies the rounding of y: by |bias| / (|weight| + eps) where the
bias is large beside the scale, and with ELU by (e⁻ᶻ - 1) / (|weight| + eps) where y nears its floor. Up to
``LIMIT`` times that is accepted: bf16 rounds y by up to 2⁻⁹ of it, which makes 2⁻⁶ (1.6 %) of x̂'s standard
deviation; fp16 a quarter of that. Beyond, x is saved for the channel, and its backward pass is computed from
x: the gradients are those of ABN, and memory grows by that channel's part of x. In fp32 and fp64 nothing is
saved: there the error is small down to |weight| = 0, where the scale is eps.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from libs.ops import mean_sums, per_channel, to_accumulation_dtype

LIMIT = 8.0  # ELU with weight 1 and bias 0 stays below it within two standard deviations: e² - 1 = 6.4


class Affine(NamedTuple):
    """What decides which channels of a layer are imprecise."""

    weight: Tensor
    bias: Tensor
    eps: float
    activation: str

    def state(self) -> tuple[object, ...]:
        """What is another when the parameters are."""
        weight, bias = self.weight, self.bias
        return weight.device, weight.data_ptr(), bias.data_ptr(), weight._version, bias._version


def imprecise_channels(layers: Sequence[Affine]) -> list[Tensor | None]:
    """For each layer, all on one device, the channels whose x̂ is magnified more than ``LIMIT`` times.

    On a GPU this waits, once for each kind of layer (eps and activation), and once where there are such
    channels.

    Returns:
        Their indices; None for a layer that has none.
    """
    kinds: dict[tuple[float, str], list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        kinds[layer.eps, layer.activation].append(index)
    found: dict[int, Tensor] = {}
    for (eps, activation), indices in kinds.items():
        weight = torch.cat([layers[index].weight.detach() for index in indices]).float()
        bias = torch.cat([layers[index].bias.detach() for index in indices]).float()
        scale = weight.abs() + eps
        imprecise = bias.abs() > LIMIT * scale
        if activation == "elu":
            imprecise |= torch.expm1(2 * scale - bias) > LIMIT * scale
        parts = imprecise.cpu().split([len(layers[index].weight) for index in indices])
        found |= {index: part.nonzero().flatten() for index, part in zip(indices, parts, strict=True)}
    channels = [found[index] for index in range(len(layers))]
    there = torch.cat(channels).to(layers[0].weight.device).split([len(indices) for indices in channels])
    return [indices if len(indices) else None for indices in there]


@cache
def count_optimizer_steps() -> None:
    """Let each step of any optimiser in this process raise the versions of the parameters that it changes.

    PyTorch's fused optimisers do not.
    """

    def count(optimizer: Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        increment_version([parameter for parameter in parameters if parameter.grad is not None])

    register_optimizer_step_post_hook(count)


class SavedChannels:
    """The backward pass of some channels of a layer, computed from their input instead of y."""

    def __init__(
        self,
        channels: Tensor,
        x: Tensor,
        grad: Tensor,
        y: Tensor,
        statistics: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        activation: str,
        param: float,
    ) -> None:
        self.channels, self.statistics = channels, statistics
        count = len(weight)
        mean, inverse_std = statistics[channels], torch.rsqrt(statistics[count + channels] + eps)
        scale, self.sign = weight[channels].abs() + eps, weight[channels].sign()
        self.factor = inverse_std * scale
        wide = to_accumulation_dtype(x)
        self.xhat = (wide - per_channel(mean, x)).mul_(per_channel(inverse_std, x))
        z = self.xhat * per_channel(scale, x) + per_channel(bias[channels], x)
        self.dz = to_accumulation_dtype(grad.index_select(1, channels))
        if activation == "relu":
            self.dz = self.dz.masked_fill(y.index_select(1, channels) <= 0, 0.0)
        elif activation == "leaky_relu":
            self.dz = torch.where(z > 0, self.dz, self.dz * param)
        elif activation == "elu":
            self.dz = torch.where(z > 0, self.dz, self.dz * (F.elu(z, alpha=param) + param))

    def correct_sums(self, sums: Tensor, dweight: Tensor) -> None:
        """Replace these channels' entries of the results of ``libs::sums``."""
        dims = [dim for dim in range(self.dz.dim()) if dim != 1]
        sum_dz_xhat = (self.dz * self.xhat).sum(dims)
        sums[self.channels] = self.dz.sum(dims)
        sums[len(dweight) + self.channels] = sum_dz_xhat
        dweight[self.channels] = sum_dz_xhat * self.sign

    def correct_gradient(self, dx: Tensor, sums: Tensor | None) -> None:
        """Replace these channels of the result of ``libs::gradient``, which had the same ``sums``."""
        dz = self.dz
        if sums is not None:
            mean_dz, mean_dz_xhat = (mean[self.channels] for mean in mean_sums(sums, self.statistics))
            dz = dz - per_channel(mean_dz, dx) - self.xhat * per_channel(mean_dz_xhat, dx)
        dx.index_copy_(1, self.channels, dz.mul_(per_channel(self.factor, dx)).to(dx.dtype))
