"""Batch normalisation with its activation, in place: what autograd sees.

    z = (x - mean) / √(var + eps) · (|weight| + eps) + bias,   y = φ(z)

Only y is held for the backward pass, in the memory that x had: φ and the affine map are inverted to get z and
x̂ back (Rota Bulò et al., In-Place Activated BatchNorm, CVPR 2018, section 3).
"""

from typing import Any, Protocol

import torch
from torch import Tensor, autograd
from torch.nn import functional as F

from libs import ops as _registered  # noqa: F401  (defines the operators)

ACTIVATIONS = ("leaky_relu", "elu", "identity")


class Participants(Protocol):
    """Those whose parts of a batch are normalised as one."""

    def gather(self, vector: Tensor) -> Tensor:
        """The vectors (N,) of all participants, stacked (P,N) in the same order for all of them."""


def activate(x: Tensor, activation: str, param: float) -> Tensor:
    """φ(x): leaky ReLU of slope ``param``, ELU of scale ``param``, or x itself."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope=param)
    if activation == "elu":
        return F.elu(x, alpha=param)
    return x


def scale_of(weight: Tensor | None, eps: float) -> Tensor | None:
    """InPlace-ABN's scale |weight| + eps (Rota Bulò et al., CVPR 2018, section 3.2), or None without affine.

    It is positive in training and in inference, so a checkpoint trained with it gives other numbers in a
    plain BatchNorm wherever a weight is negative.
    """
    return None if weight is None else weight.abs() + eps


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous, or channels-last, which (B,C,L) may be too."""
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


class InPlaceABNFunction(autograd.Function):
    """Overwrites x (B,C,…) with y. Its first derivatives are exact; it has no second ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
        param: float,
        participants: Participants | None,
    ) -> Tensor:
        if training:
            mean, var = torch.ops.libs.statistics(x)
            count = torch.full_like(mean[:1], x.numel() // x.shape[1])
            if participants is not None:
                mean, var, count = _joined(mean, var, count, participants)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * count / (count - 1)).to(running_var.dtype), momentum)
        else:
            kind = torch.promote_types(x.dtype, torch.float32)
            mean, var, count = running_mean.to(kind), running_var.to(kind), None
        # Half types come with parameters of their own or in fp32; they are computed with in fp32.
        weight, bias = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
        torch.ops.libs.normalize_(x, mean, var, weight, bias, eps, activation, param)
        ctx.mark_dirty(x)
        # Saving y makes autograd notice if somebody changes it before the backward pass.
        ctx.save_for_backward(x, weight, bias, var, count)
        ctx.settings, ctx.participants = (eps, activation, param), participants
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("InPlaceABN has no second derivatives; use ABN where they are wanted")
        y, weight, bias, var, count = ctx.saved_tensors
        if grad.stride() != y.stride():
            grad = torch.empty_like(y).copy_(grad)
        dx: Tensor | None = None
        sum_dz = sum_dz_xhat = torch.zeros_like(var)
        if count is not None or any(ctx.needs_input_grad[1:3]):
            sum_dz, sum_dz_xhat = torch.ops.libs.sums(grad, y, weight, bias, *ctx.settings)
        if ctx.needs_input_grad[0]:
            if count is None:  # inference: the statistics do not depend on x
                means = [torch.zeros_like(var)] * 2
            else:
                both = torch.cat((sum_dz, sum_dz_xhat))
                if ctx.participants is not None:
                    both = ctx.participants.gather(both).sum(0)
                means = list((both / count).chunk(2))
            dx = torch.ops.libs.gradient(grad, y, var, weight, bias, *means, *ctx.settings)
        dweight = sum_dz_xhat * weight.sign() if ctx.needs_input_grad[1] else None
        return dx, dweight, sum_dz if ctx.needs_input_grad[2] else None, *[None] * 8


def _joined(
    mean: Tensor, var: Tensor, count: Tensor, participants: Participants
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of all participants' parts together, which may differ in size."""
    channels = len(mean)
    parts = participants.gather(torch.cat((mean, var, count)))
    means, variances, counts = parts.split((channels, channels, 1), dim=1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean) ** 2) * counts).sum(0) / total, total
