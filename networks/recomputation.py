"""Holding less for the backward pass by computing it again there."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from libs import keep_statistics

_thread = threading.local()  # a backward pass on a GPU has a thread of its own


@contextmanager
def computed_again(tensor: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Layers called within do not hold ``tensor`` for their backward pass: ``compute`` makes it again."""
    held_anyway = torch.compiler.is_compiling() or not torch.is_grad_enabled()  # a compiler decides by itself
    if held_anyway or getattr(_thread, "in_segment", False):
        yield
        return
    address, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(packed: Tensor | None) -> Tensor:
        return compute() if packed is None else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def segment(layers: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which nothing but x is held: the backward pass computes it a second time.

    Args:
        layers: the normalisation that ``function`` uses is within; its statistics are updated only once.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _in_segment(None), _in_segment(layers)

    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _in_segment(layers: nn.Module | None) -> Iterator[None]:
    """Within a segment nothing else need be computed again; ``layers``: those of a second computation."""
    _thread.in_segment = True
    try:
        if layers is None:
            yield
        else:
            with keep_statistics(layers):
                yield
    finally:
        _thread.in_segment = False
