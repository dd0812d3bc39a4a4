"""Criss-cross attention as a readable formula in plain PyTorch.

This is the definition that everything else is held against (paper, section 3.1). It also serves where a
formula is needed instead of a kernel: second derivatives and export. It stores the whole attention.

    out[u] = Σ_i softmax_i(query[u] · key[i]) value[i],   i in the row and the column of position u

The path of a position has H + W - 1 positions: its own one, met by the row and by the column, counts once.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function on tensors choose its own precision: autocast would undo its casts to fp32."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not torch.amp.is_autocast_available(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@without_autocast
def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The attention of each position along its column, then along its row.

    Args:
        query, key: (B,Cr,H,W).

    Returns:
        (B,H,W,H+W), in fp32 for half types. Sums to 1 over the last dimension. The own position carries its
        weight in the row part and exactly 0 in the column part.
    """
    height = query.shape[2]
    query, key = _upcast(query), _upcast(key)
    column = torch.einsum("bchw,bcgw->bhwg", query, key)  # (B,H,W,H): along g, the rows of the column
    row = torch.einsum("bchw,bchv->bhwv", query, key)  # (B,H,W,W)
    own = torch.eye(height, dtype=torch.bool, device=query.device).unsqueeze(1)  # (H,1,H): g == h
    return torch.cat([column.masked_fill(own, float("-inf")), row], dim=-1).softmax(dim=-1)


@without_autocast
def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B,Cr,H,W), (B,Cr,H,W), (B,C,H,W) → (B,C,H,W), of the value's dtype."""
    height, width = query.shape[2:]
    column, row = attention_weights(query, key).split([height, width], dim=-1)
    wide = _upcast(value)
    out = torch.einsum("bhwg,bcgw->bchw", column, wide) + torch.einsum("bhwv,bchv->bchw", row, wide)
    return out.to(value.dtype)


def _upcast(x: Tensor) -> Tensor:
    """Half types to fp32: an energy of 100 in bf16 is off by up to 0.25, its softmax weight by a quarter."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
