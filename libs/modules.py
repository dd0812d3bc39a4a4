"""ABN and its two siblings: one set of state-dict entries, one set of numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from libs.functions import ACTIVATIONS, InPlaceABNFunction, Participants, activate, is_dense, scale_of
from libs.synchronized import Processes, Replica, join


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
        self.frozen = False
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

    def freeze(self) -> None:
        """Fix statistics and affine parameters, also in ``train()``, for fine-tuning."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def extra_repr(self) -> str:
        activation = self.activation
        if activation != "identity":
            activation += f"({self.activation_param})"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, activation={activation}"
        )


class InPlaceABN(ABN):
    """ABN that overwrites its input with its output and holds only that (Rota Bulò et al., CVPR 2018).

    The input must not be wanted by anybody else: neither a leaf that requires a gradient nor something that
    another layer has saved for its own; and nobody may change the output before the backward pass. Autograd
    raises where this is not so. With leaky ReLU and ELU, ``activation_param`` must be positive, so that they
    can be inverted. There are no second derivatives.

    Raises (in ``forward``):
        ValueError: a wrong number of channels or dimensions, a single value per channel in training, or
            memory that cannot be overwritten (neither contiguous nor channels-last).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.activation != "identity" and self.activation_param <= 0:
            raise ValueError(
                f"{self.activation} can be inverted for activation_param > 0; got {self.activation_param}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,…), contiguous or channels-last → the same tensor, overwritten."""
        participants = self.participants() if self.training else None
        if torch.compiler.is_compiling() and participants is None:  # the compiler plans memory by itself
            return super().forward(x)
        self._check(x, alone=participants is None)
        if x.numel() == 0:
            return x
        return InPlaceABNFunction.apply(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
            self.activation,
            self.activation_param,
            participants,
        )

    def participants(self) -> Participants | None:
        """Those with whom statistics are shared in training; None: this layer is alone."""
        return None

    def _check(self, x: Tensor, alone: bool) -> None:
        name, shape = type(self).__name__, tuple(x.shape)
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"{name} wants (B,{self.num_features},…); got shape {shape}")
        if self.training and alone and x.numel() == self.num_features:
            raise ValueError(f"{name} needs more than one value per channel to train on; got shape {shape}")
        if not is_dense(x):
            raise ValueError(
                f"{name} overwrites its input, which must be contiguous or channels-last; "
                f"got shape {shape} with strides {x.stride()}"
            )


class InPlaceABNSync(InPlaceABN):
    """InPlaceABN with the statistics of all participants while training, as if they held one batch.

    Participants are the processes of ``process_group`` (default: all; a process outside it is alone), or the
    replicas of nn.DataParallel, whose threads meet in ``libs.synchronized.Rendezvous``; not both at once.
    Their parts may differ in size, not in the order of layers: under nn.DataParallel let each replica end in
    one loss, or autograd may enter several heads in another order on each device.

    Raises (in ``forward``, in addition):
        ValueError: an empty part, or processes that disagree on the number of channels.
        RuntimeError: another replica failed (``abort``), or nn.DataParallel within several processes.
    """

    def __init__(self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._processes = Processes(self.num_features, process_group)
        self._replica: Replica | None = None  # this layer is no replica

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception as error:
            self.abort(error)
            raise

    def abort(self, error: BaseException) -> None:
        """Of a replica: stop the other replicas of its network, which would wait for this one, with an error.

        To be called by whoever runs replicas and catches ``error`` from one; once, on any of its layers.
        """
        if self._replica is not None:
            self._replica.rendezvous.abort(error)

    def participants(self) -> Participants | None:
        processes = self._processes if self._processes.size > 1 else None
        if self._replica is None or self._replica.size == 1:
            return processes
        if processes is not None:
            raise RuntimeError(
                f"InPlaceABNSync is one of {self._replica.size} replicas of nn.DataParallel in one of "
                f"{processes.size} processes; it synchronises over one of the two: give each process one GPU"
            )
        return self._replica

    def _check(self, x: Tensor, alone: bool) -> None:
        super()._check(x, alone)
        if not alone and x.numel() == 0:
            raise ValueError(
                "InPlaceABNSync needs a value per channel from every participant; "
                f"got an empty part of shape {tuple(x.shape)}"
            )

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        replica.running_mean = self.running_mean.detach()  # same memory, another object: the stand-in
        replica._replica = join(id(self), replica.running_mean)
        return replica


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, layers in training do not update running statistics: for a batch that they saw already."""
    layers = [(layer, layer.momentum) for layer in module.modules() if isinstance(layer, ABN)]
    try:
        for layer, _ in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in layers:
            layer.momentum = momentum


def abort(network: nn.Module, error: BaseException) -> None:
    """``InPlaceABNSync.abort`` of whatever such layer a replica has."""
    for layer in network.modules():
        if isinstance(layer, InPlaceABNSync):
            layer.abort(error)
            return
