"""ABN and its two siblings: one set of state-dict entries, one set of numbers."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Self
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from libs.functions import (
    ACTIVATIONS,
    InPlaceABNFunction,
    Settings,
    SyncGroup,
    activate,
    is_dense,
    scale_of,
)
from libs.precision import Affine, count_optimizer_steps, imprecise_channels
from libs.synchronized import Processes, Replica, join


class ABN(nn.Module):
    """Batch normalisation followed by an activation; the scale is |weight| + eps.

    The state dict holds ``weight, bias, running_mean, running_var`` and no ``num_batches_tracked``.

    Args:
        num_features: channels C of the (B,C,…) input.
        eps: added to the variance and to |weight|.
        momentum: weight of the new batch in the running statistics.
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
        if momentum is None:  # BatchNorm's cumulative average
            raise ValueError("momentum must be a number; got None")
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


# Layers in half types on a GPU, by the stream on which they work. A thread may have a network of its own.
_ON_STREAM: defaultdict[object, WeakSet["InPlaceABN"]] = defaultdict(WeakSet)
_LOCK = Lock()


class InPlaceABN(ABN):
    """ABN that overwrites its input with its output and saves only that (Rota Bulò et al., CVPR 2018).

    The input must not be needed by anything else: neither a leaf that requires a gradient nor something that
    another layer has saved for backward; and nobody may change the output before the backward pass. Autograd
    raises where this is not so; it cannot know of code that reads the input later and finds the output there.
    With leaky ReLU and ELU, ``activation_param`` must be positive, so that they can be inverted.

    Gradients are those of ABN up to the rounding of the output, from which the input is recovered; in half
    types the input of channels where that rounding counts is saved (libs/precision.py). There are no second
    derivatives. Under torch.compile, torch.func's transforms and forward-mode differentiation the layer
    computes as ABN does, out of place.

    Raises (in ``forward``):
        ValueError: a wrong number of channels or dimensions, a single value per channel in training, or
            memory that cannot be overwritten (neither contiguous nor channels-last, or a leaf's).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.activation != "identity" and self.activation_param <= 0:
            raise ValueError(
                f"{self.activation} can be inverted for activation_param > 0; got {self.activation_param}"
            )
        # On a GPU: of which state of the parameters the channels to be saved are known, and these.
        self._imprecise: tuple[object, Tensor | None] = (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,…), contiguous or channels-last → the same tensor, overwritten."""
        sync_group = self.sync_group() if self.training else None
        if self._computes_as_abn(sync_group, x):
            return super().forward(x)
        self._check(x, alone=sync_group is None)
        return x if x.numel() == 0 else self._run_in_place(x, None, self.activation, sync_group)

    def relu(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z = self(x), in x's memory, and relu(z + shortcut): see ``norm_relu``."""
        sync_group = self.sync_group() if self.training else None
        if self._computes_as_abn(sync_group, x, shortcut):
            return _norm_relu(self, x, shortcut)
        if shortcut is not None and _share_memory(x, shortcut):
            shortcut = shortcut.clone()  # of what x holds before it is overwritten
        fits = shortcut is None or (shortcut.shape == x.shape and shortcut.dtype == x.dtype)
        # Autograd lets no function that returns several tensors change a view.
        if self.activation != "identity" or not fits or x._is_view():
            return _norm_relu(self, x, shortcut)
        self._check(x, alone=sync_group is None)
        if x.numel() == 0:
            return x, x.clone()
        if shortcut is not None and shortcut.stride() != x.stride():
            shortcut = torch.empty_like(x).copy_(shortcut)
        return self._run_in_place(x, shortcut, "relu", sync_group)

    def sync_group(self) -> SyncGroup | None:
        """The members that share statistics in training; None: this layer is alone."""
        return None

    def _run_in_place(
        self, x: Tensor, shortcut: Tensor | None, activation: str, sync_group: SyncGroup | None
    ) -> Any:
        if torch.compiler.is_compiling():
            x = x.clone()  # PyTorch loses the gradient of an input that a compiled function overwrites
        settings = Settings(
            self.running_mean,
            self.running_var,
            self.training,
            self.momentum,
            self.eps,
            activation,
            self.activation_param,
            sync_group,
        )
        channels = self._imprecise_channels(x)
        return InPlaceABNFunction.apply(x, self.weight, self.bias, shortcut, channels, settings)

    def _computes_as_abn(self, sync_group: SyncGroup | None, *tensors: Tensor | None) -> bool:
        """Whether PyTorch's own formula must serve, which every transform of functions knows."""
        if torch.compiler.is_compiling():  # the compiler plans memory by itself
            return sync_group is None
        inputs = [*tensors, self.weight, self.bias]
        if not torch._C._are_functorch_transforms_active() and not any(map(_has_tangent, inputs)):
            return False
        if sync_group is not None:
            raise RuntimeError(
                f"{type(self).__name__} cannot synchronise statistics within torch.func's transforms or "
                "forward-mode differentiation; use ABN there"
            )
        return True

    def _imprecise_channels(self, x: Tensor) -> Tensor | None:
        affine = self._affine()
        if x.dtype not in (torch.float16, torch.bfloat16) or affine is None:
            return None
        if not torch.is_grad_enabled() or not (self.training or affine.weight.requires_grad):
            return None
        # A replica's parameters are copies, new in each pass, perhaps in the same memory, and a sharded one
        # is not what an optimiser changes.
        if not x.is_cuda or type(affine.weight) is not nn.Parameter:
            return imprecise_channels([affine])[0]
        if torch.cuda.is_current_stream_capturing():  # nothing may wait
            return self._imprecise[1]
        return self._known_channels(affine, torch.cuda.current_stream(x.device))

    def _known_channels(self, affine: Affine, stream: object) -> Tensor | None:
        """The imprecise channels, found once for each state of the parameters, since that waits for the GPU.

        The first layer whose parameters have changed finds them for all that work on its stream, so that not
        each of them waits in a step of training. Changes through ``.data`` are not seen.
        """
        count_optimizer_steps()
        if self._imprecise[0] == affine.state():
            return self._imprecise[1]
        with _LOCK:
            _ON_STREAM[stream].add(self)
            all_layers = [(layer, layer._affine()) for layer in _ON_STREAM[stream]]
            here = [(layer, x) for layer, x in all_layers if x and x.weight.device == affine.weight.device]
            changed = [(layer, x) for layer, x in here if x.state() != layer._imprecise[0]]
            found = imprecise_channels([x for _, x in changed])
            for (layer, x), channels in zip(changed, found, strict=True):
                layer._imprecise = x.state(), channels
        return self._imprecise[1]

    def _affine(self) -> Affine | None:
        if self.weight is None or self.bias is None:
            return None
        return Affine(self.weight, self.bias, self.eps, self.activation)

    def _check(self, x: Tensor, alone: bool) -> None:
        name, shape = type(self).__name__, tuple(x.shape)
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"{name} needs (B,{self.num_features},…); got shape {shape}")
        if self.training and alone and x.numel() == self.num_features:
            raise ValueError(f"{name} needs more than one value per channel to train on; got shape {shape}")
        if not is_dense(x):
            raise ValueError(
                f"{name} overwrites its input, which must be contiguous or channels-last; "
                f"got shape {shape} with strides {x.stride()}"
            )
        if torch.is_grad_enabled() and x.is_leaf and x.requires_grad:
            raise ValueError(
                f"{name} overwrites its input, which must not be a leaf that requires a gradient; "
                "give it x.clone(), or use ABN"
            )


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _has_tangent(x: Tensor | None) -> bool:
    forward_ad = torch.autograd.forward_ad
    return x is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def norm_relu(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """z = norm(x) and relu(z), or relu(z + shortcut), in one pass for an InPlaceABN with identity activation.

    The numbers are those of ``norm``, an addition and a ReLU one after another. InPlaceABN writes z into the
    memory of x and saves z and ``shortcut`` for backward, not the sum nor the ReLU. Take gradients through
    the second output only; z is returned (detached) for those who recompute ReLU's output from it.
    Any other module is called, and ReLU and addition follow; forward hooks see these calls only.

    Args:
        norm: a normalisation layer, or nn.Identity where it has been folded into a convolution.
        x, shortcut: (B,C,…).
    """
    if isinstance(norm, InPlaceABN):
        z, out = norm.relu(x, shortcut)
    else:
        z, out = _norm_relu(norm, x, shortcut)
    return z.detach(), out


def _norm_relu(norm: nn.Module, x: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor]:
    z: Tensor = norm(x)
    # The gradient of F.threshold needs its input, which is saved anyway; that of relu needs its output.
    return z, F.threshold(z, 0.0, 0.0) if shortcut is None else F.relu_(z + shortcut)


class InPlaceABNSync(InPlaceABN):
    """InPlaceABN with the statistics of all members of its group in training, as if they held one batch.

    Members are the processes of ``process_group``, or the replicas of nn.DataParallel, whose threads meet in
    ``libs.synchronized.Rendezvous``; not both at once. By default all processes are members, and exchange
    statistics in a group of these layers' own, which does not queue behind DDP's gradients. A process outside
    ``process_group`` is alone. The parts may differ in size, not in the order of layers: under
    nn.DataParallel let each replica end in one loss, or autograd may enter several heads in another order on
    each device. Call ``prepare_to_compile`` before torch.compile, where the layer works out of place.

    Raises (in ``forward``, in addition):
        ValueError: an empty part, or processes that disagree on the number of channels.
        RuntimeError: another replica failed (``abort``), or nn.DataParallel within several processes.
    """

    def __init__(self, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._processes = Processes(self.num_features, process_group)
        self._replica: Replica | None = None  # this layer is no replica

    def forward(self, x: Tensor) -> Tensor:
        with self._aborts_others():
            return super().forward(x)

    def relu(self, x: Tensor, shortcut: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with self._aborts_others():
            return super().relu(x, shortcut)

    @contextmanager
    def _aborts_others(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.abort(error)
            raise

    def abort(self, error: BaseException) -> None:
        """Stop the other replicas of the network, which would wait for this one, with an error.

        Call it when a replica has raised ``error``; once, on any layer of that replica.
        """
        if self._replica is not None:
            self._replica.rendezvous.abort(error)

    def sync_group(self) -> SyncGroup | None:
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
                "InPlaceABNSync needs a value per channel from every member; "
                f"got an empty part of shape {tuple(x.shape)}"
            )

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()
        replica.running_mean = self.running_mean.detach()  # same memory, another object: the stand-in
        replica._replica = join(id(self), replica.running_mean)
        return replica


@contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, layers in training leave running statistics alone: for a second pass over the same batch."""
    layers = [(layer, layer.momentum) for layer in module.modules() if isinstance(layer, ABN)]
    try:
        for layer, _ in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in layers:
            layer.momentum = momentum


def prepare_to_compile(network: nn.Module) -> None:
    """What a compiler cannot trace of InPlaceABNSync; to be called in all processes before it compiles.

    The processes compare their layers' channels, and make the group of these layers. Without it a compiled
    network has the same numbers.

    Raises:
        ValueError: on every process, if their layers differ in channels.
    """
    for layer in network.modules():
        if isinstance(layer, InPlaceABNSync) and isinstance(group := layer.sync_group(), Processes):
            group.compare_channels(layer.running_mean.device)


def abort(network: nn.Module, error: BaseException) -> None:
    """``InPlaceABNSync.abort`` on the first such layer of a replica."""
    for layer in network.modules():
        if isinstance(layer, InPlaceABNSync):
            layer.abort(error)
            return
