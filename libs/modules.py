"""ABN and its two siblings: one set of state-dict entries, one set of numbers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from libs.functions import ACTIVATIONS, activate, scale_of, synchronized_batch_norm


class ABN(nn.Module):
    """Batch normalisation followed by an activation; the scale is |weight| + eps.

    The state dict holds ``weight, bias, running_mean, running_var`` and no ``num_batches_tracked``.

    Args:
        num_features: channels C of the (B,C,…) input.
        eps: added to the variance and to |weight|.
        momentum: share of the new batch in the running statistics.
        affine: learn weight and bias; without, the scale is 1 and there is no offset.
        activation: "leaky_relu", "elu" or "identity".
        activation_param: slope of the leaky ReLU, or scale of the ELU.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        activation: str = "leaky_relu",
        activation_param: float = 0.01,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.activation, self.activation_param = activation, activation_param
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,…) → (B,C,…)."""
        return activate(self._normalize(x), self.activation, self.activation_param)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            scale_of(self.weight, self.eps),
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )

    def extra_repr(self) -> str:
        activation = self.activation
        if activation != "identity":
            activation += f"({self.activation_param})"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, activation={activation}"
        )


class InPlaceABN(ABN):
    """ABN that is to hold its activations once; this version computes it as ``ABN`` does."""


class InPlaceABNSync(InPlaceABN):
    """InPlaceABN with the statistics of all processes of the default group while training."""

    def _normalize(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super()._normalize(x)
        return synchronized_batch_norm(
            x,
            self.running_mean,
            self.running_var,
            scale_of(self.weight, self.eps),
            self.bias,
            self.momentum,
            self.eps,
        )
