"""Batch normalisation with its activation, in place: what autograd sees.

    z = (x - mean) / √(var + eps) · (|weight| + eps) + bias,   y = φ(z)

Only y is saved for backward, in the memory that x had: φ and the affine map are inverted to recover z and x̂
(Rota Bulò et al., In-Place Activated BatchNorm, CVPR 2018, section 3).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, autograd
from torch.nn import functional as F

from libs import ops as _registered  # noqa: F401  (defines the operators)
from libs.precision import SavedChannels

ACTIVATIONS = ("leaky_relu", "elu", "identity")


class SyncGroup(Protocol):
    """The members whose parts of a batch are normalised as one batch."""

    def gather(self, vector: Tensor) -> Tensor:
        """The vectors (N,) of all members, stacked (P,N) in the same order on each of them."""


class Settings(NamedTuple):
    """What a call of the function needs to know of its layer.

    ``activation`` may be "relu" besides ``ACTIVATIONS``: y is z then, and a second output relu(z + shortcut).
    """

    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float
    eps: float
    activation: str
    param: float
    sync_group: SyncGroup | None

    @property
    def phi(self) -> tuple[float, str, float]:
        """eps, activation and its parameter, the last arguments of the operators."""
        return self.eps, self.activation, self.param


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
    """Overwrites x (B,C,…) with y and returns it; with "relu", (z, relu(z + shortcut)).

    First derivatives are those of ABN up to the rounding of y, from which x̂ is recovered; of the channels in
    ``channels`` x itself is saved, for there that rounding counts (libs/precision.py). There are no second
    derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shortcut: Tensor | None,
        channels: Tensor | None,
        settings: Settings,
    ) -> Any:
        statistics = _statistics(x, settings)
        # Half types come with parameters of their own or in fp32; they are computed with in fp32.
        weight, bias = (p if p is None else p.to(statistics.dtype) for p in (weight, bias))
        saved_x = None if channels is None else x.index_select(1, channels)
        out = None
        if settings.activation == "relu":
            out = torch.ops.libs.normalize_relu_(x, statistics, weight, bias, shortcut, settings.eps)
        else:
            torch.ops.libs.normalize_(x, statistics, weight, bias, *settings.phi)
        ctx.mark_dirty(x)
        # Saving y makes autograd notice if somebody changes it before the backward pass.
        ctx.save_for_backward(x, weight, bias, shortcut, statistics, channels, saved_x)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return x if out is None else (x, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("InPlaceABN has no second derivatives; use ABN where they are wanted")
        if len(grads) == 2 and grads[0] is not None:
            raise RuntimeError(
                "the tensor that norm_relu has overwritten takes no part in the graph; detach it"
            )
        grad, settings = grads[-1], ctx.settings
        if grad is None:
            return (None,) * 6
        y, weight, bias, shortcut, statistics, channels, saved_x = ctx.saved_tensors
        if grad.stride() != y.stride():
            grad = torch.empty_like(y).copy_(grad)
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        phi, sums, dweight = settings.phi, None, None
        if shortcut is not None:
            phi = (settings.eps, "identity", 0.0)  # of the gradient behind the ReLU
            sums, dweight, grad = torch.ops.libs.sums_add_relu(grad, y, shortcut, weight, bias, settings.eps)
        elif settings.training or need_weight or need_bias:
            sums, dweight = torch.ops.libs.sums(grad, y, weight, bias, *phi)
        saved = None
        if channels is not None and sums is not None and dweight is not None:
            saved = SavedChannels(channels, saved_x, grad, y, statistics, weight, bias, *phi)
            saved.correct_sums(sums, dweight)
        dx: Tensor | None = None
        if need_x:
            all_sums = sums if settings.training else None  # else the statistics do not depend on x
            if all_sums is not None and settings.sync_group is not None:
                all_sums = settings.sync_group.gather(all_sums)
            dx = torch.ops.libs.gradient(grad, y, statistics, all_sums, weight, bias, *phi)
            if saved is not None:
                saved.correct_gradient(dx, all_sums)
        dbias = sums[: y.shape[1]] if need_bias and sums is not None else None
        return dx, dweight if need_weight else None, dbias, grad if shortcut is not None else None, None, None


def _statistics(x: Tensor, settings: Settings) -> Tensor:
    """Of this batch in training, where the running ones are updated too; otherwise the running ones."""
    kind = torch.promote_types(x.dtype, torch.float32)
    running = [settings.running_mean.to(kind), settings.running_var.to(kind)]
    if not settings.training:
        return torch.cat(running)
    if settings.sync_group is None:
        statistics: Tensor = torch.ops.libs.statistics(x, *running, settings.momentum)
    else:
        # Inductor cannot compile an operator that changes none of what its schema lets it change.
        unused = [each.clone() for each in running] if torch.compiler.is_compiling() else [None, None]
        parts = settings.sync_group.gather(torch.ops.libs.statistics(x, *unused, 0.0))
        statistics = torch.ops.libs.merge_statistics(parts, *running, settings.momentum)
    if kind != settings.running_mean.dtype:
        settings.running_mean.copy_(running[0])
        settings.running_var.copy_(running[1])
    return statistics
