"""Saves memory by recomputing activations in the backward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from libs import keep_statistics

_thread = threading.local()  # a backward pass on a GPU has a thread of its own


@contextmanager
def recompute_in_backward(tensor: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Layers called within do not save ``tensor`` for their backward pass: ``compute`` makes it again.

    It is computed once, at its first use in the backward pass, and freed after its last.
    """
    # A compiler plans memory by itself; within torch.func's transforms tensors have no address.
    is_transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    saved_anyway = is_transformed or not torch.is_grad_enabled()
    if saved_anyway or getattr(_thread, "in_checkpointed", False):
        yield
        return
    address, shape = tensor.data_ptr(), tensor.shape
    uses, to_come = 0, 0
    again: Tensor | None = None

    def pack(saved: Tensor) -> Tensor | None:
        nonlocal uses
        if saved.data_ptr() != address or saved.shape != shape:
            return saved
        uses += 1
        return None

    def unpack(packed: Tensor | None) -> Tensor:
        nonlocal again, to_come
        if packed is not None:
            return packed
        if again is None:
            again, to_come = compute(), uses
        result, to_come = again, to_come - 1
        if to_come == 0:
            again = None
        return result

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def checkpointed(layers: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), saving nothing but x: the backward pass computes it a second time, with the same numbers.

    Random layers draw the same masks in both computations, from the state of the generators at the first.

    Args:
        layers: the normalisation that ``function`` uses is within; its statistics are updated only once.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _in_checkpointed(None), _in_checkpointed(layers)

    # Stopping early is done by an exception, which synchronised layers would take for a replica's failure.
    with set_checkpoint_early_stop(False):
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


@contextmanager
def _in_checkpointed(layers: nn.Module | None) -> Iterator[None]:
    """Marks a checkpointed part; ``layers``: those of its second computation, None in the first."""
    _thread.in_checkpointed = True
    try:
        if layers is None:
            yield
        else:
            with keep_statistics(layers), _keep_batch_norm_statistics(layers):
                yield
    finally:
        _thread.in_checkpointed = False


@contextmanager
def _keep_batch_norm_statistics(module: nn.Module) -> Iterator[None]:
    """``libs.keep_statistics`` for PyTorch's own BatchNorm, which a backbone of somebody else may have."""
    layers = [x for x in module.modules() if isinstance(x, _BatchNorm) and x.training]
    before = [(x.momentum, x.num_batches_tracked) for x in layers]
    try:
        for layer in layers:
            layer.momentum, layer.num_batches_tracked = 0.0, None
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches
