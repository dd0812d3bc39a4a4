"""Criss-cross attention as a readable formula in plain PyTorch.

This is the definition that everything else is held against (paper, section 3.2; for clips, the paper's 3-D
criss-cross attention). It also serves where a formula is needed instead of a kernel: second derivatives,
function transforms and export. It stores the whole attention.

    out[u] = Σ_i softmax_i(query[u] · key[i]) value[i],   i on one of the lines through position u

Lines are the row and the column of a position, and in a clip the line through time. The position itself lies
on all of them and counts once, so there are H + W - 1 (T + H + W - 2) terms.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """The attention of each position along its column, then its row; in a clip along time before them.

    Args:
        query, key: (B,Cr,H,W) or (B,Cr,T,H,W).

    Returns:
        (B,H,W,H+W) or (B,T,H,W,T+H+W), in fp32 for half types. Sums to 1 over the last dimension. The own
        position carries its weight in the row part and exactly 0 in the others.
    """
    if query.dim() == 5 and query.shape[2] == 1:  # an image, and no weight along time
        return F.pad(attention_weights(query.squeeze(2), key.squeeze(2)), (1, 0)).unsqueeze(1)
    query, key = _upcast(query), _upcast(key)
    row = torch.einsum("bc...hw,bc...hv->b...hwv", query, key)
    column = torch.einsum("bc...hw,bc...gw->b...hwg", query, key)  # along g, the rows of the column
    own = _own(query.shape[-2], query).unsqueeze(1)  # (H,1,H): g == h
    parts = [column.masked_fill(own, float("-inf")), row]
    if query.dim() == 5:
        time = torch.einsum("bcthw,bcshw->bthws", query, key)
        own = _own(query.shape[2], query)[:, None, None]  # (T,1,1,T): s == t
        parts.insert(0, time.masked_fill(own, float("-inf")))
    return torch.cat(parts, dim=-1).softmax(dim=-1)


@without_autocast
def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B,Cr,H,W), (B,Cr,H,W), (B,C,H,W) → (B,C,H,W), or the same with T after the channels.

    The result has the value's dtype.
    """
    if value.dim() == 5 and value.shape[2] == 1:
        return criss_cross_attention(query.squeeze(2), key.squeeze(2), value.squeeze(2)).unsqueeze(2)
    *time, column, row = attention_weights(query, key).split(list(value.shape[2:]), dim=-1)
    wide = _upcast(value)
    out = torch.einsum("b...hwg,bc...gw->bc...hw", column, wide)
    out = out + torch.einsum("b...hwv,bc...hv->bc...hw", row, wide)
    if time:
        out = out + torch.einsum("bthws,bcshw->bcthw", time[0], wide)
    return out.to(value.dtype)


def _own(length: int, like: Tensor) -> Tensor:
    return torch.eye(length, dtype=torch.bool, device=like.device)


def _upcast(x: Tensor) -> Tensor:
    """Half types to fp32: an energy of 100 in bf16 is off by up to 0.25, its softmax weight by a quarter."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
