"""Forward and backward pass in plain PyTorch, a chunk of lines at a time: serves where no kernel is compiled.

A sample is a (T,H,W,C) array, an image one of T = 1, which a channels-last tensor is without a copy: a row is
a matrix of leading dimension C, a column one of leading dimension W·C, a line through time one of H·W·C. They
go to batched matrix products as they are. The forward pass keeps the log-sum-exp of each position's energies,
from which the backward pass recomputes the attention instead of loading it (paper, section 3.2; docs/op.md).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cc_attention.reference import without_autocast

# Small enough for the chunk's C·12·97 floats (2.4 MB at C = 512) to stay in the cache.
LINES_PER_CHUNK = 12


@without_autocast
def forward(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """Criss-cross attention and its log-sum-exp.

    Args:
        query, key: (B,Cr,H,W) or (B,Cr,T,H,W).
        value: (B,C,H,W) or (B,C,T,H,W).
        tf32: ignored; PyTorch's matrix products follow its own settings.

    Returns:
        out, of the value's shape and dtype, channels-last; lse (B,H,W) or (B,T,H,W) in fp32 (fp64 for fp64).
    """
    out = empty_channels_last(value)
    shape = (value.shape[0], *value.shape[2:])
    lse = torch.empty(shape, dtype=accumulation_dtype(value), device=value.device)
    if lse.numel() == 0:  # no positions: a maximum over none does not exist
        return out, lse
    for index in range(value.shape[0]):
        q, k, v = _sample(query, index), _sample(key, index), _sample(value, index)
        out_sample = _sample(out, index)
        lse_sample = lse[index].view(v.shape[:3])
        time = _time_energies(q, k) if len(v) > 1 else None
        for frame in range(len(v)):
            frame_time = None if time is None else time[frame]
            _forward_frame(q[frame], k[frame], v[frame], frame_time, out_sample[frame], lse_sample[frame])
        if time is not None:
            for y in range(v.shape[1]):  # (W,T,T) weights of a row's positions with (W,T,C) values
                values = v[:, y].transpose(0, 1)
                out_sample[:, y] += (time[:, y].transpose(0, 1) @ values).transpose(0, 1)
        _store(out, index, out_sample)
    return out, lse


def _time_energies(query: Tensor, key: Tensor) -> Tensor:
    """(T,H,W,Cr), (T,H,W,Cr) → (T,H,W,T), -inf at the own position, which the row counts."""
    frames, height, width, _ = query.shape
    energies = query.new_empty((frames, height, width, frames))
    for y in range(height):
        energies[:, y] = (query[:, y].transpose(0, 1) @ key[:, y].permute(1, 2, 0)).transpose(0, 1)
    energies.diagonal(dim1=0, dim2=3).fill_(float("-inf"))
    return energies


def _forward_frame(
    query: Tensor, key: Tensor, value: Tensor, time: Tensor | None, out: Tensor, lse: Tensor
) -> None:
    """Writes a frame's sums along rows and columns to ``out`` and its log-sum-exp to ``lse``.

    Args:
        query, key: (H,W,Cr).
        value, out: (H,W,C).
        time: (H,W,T), the frame's energies along time, which become its weights; None for an image.
        lse: (H,W).
    """
    height, width = value.shape[:2]
    row = query @ key.transpose(1, 2)  # (H,W,W)
    column = query.transpose(0, 1) @ key.permute(1, 2, 0)  # (W,H,H)
    # A column's energy of the own position equals the row's, so it does not change the maximum; after the
    # exponential it is set to zero, for the row has counted it.
    maximum = torch.maximum(row.amax(dim=2), column.amax(dim=2).T)
    if time is not None:
        maximum = torch.maximum(maximum, time.amax(dim=2))
    row = row.sub_(maximum.unsqueeze(2)).exp_()
    column = column.sub_(maximum.T.unsqueeze(2)).exp_()
    column.diagonal(dim1=1, dim2=2).zero_()
    total = row.sum(dim=2).add_(column.sum(dim=2).T)
    if time is not None:
        time.sub_(maximum.unsqueeze(2)).exp_()
        total += time.sum(dim=2)
    torch.add(maximum, total.log(), out=lse)
    row.div_(total.unsqueeze(2))
    column.div_(total.T.unsqueeze(2))
    if time is not None:
        time.div_(total.unsqueeze(2))

    for chunk in _chunks(height):
        out[chunk] = _weighted_sum(row[chunk], value[chunk])
    del row  # makes room for the columns' copies
    for chunk in _chunks(width):
        out[:, chunk] += _weighted_sum(column[chunk], value[:, chunk].transpose(0, 1)).transpose(0, 1)


@without_autocast
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, channels-last, from the gradient of ``out``.

    With P the attention and dP = grad · valueᵀ: dE = P ∘ (dP - δ), δ = Σ P ∘ dP = Σ_c grad ∘ out.
    """
    dquery, dkey, dvalue = (empty_channels_last(x) for x in (query, key, value))
    if lse.numel() == 0:
        return dquery, dkey, dvalue
    for index in range(value.shape[0]):
        q, k, v, g, o = (_sample(x, index) for x in (query, key, value, grad, out))
        dq, dk, dv = _sample(dquery, index), _sample(dkey, index), _sample(dvalue, index)
        frames, height, width = v.shape[:3]
        z = lse[index].view(frames, height, width, 1)
        delta = torch.empty_like(z)
        tensors = [q, k, v, g, z, delta, dq, dk, dv]
        for frame in range(frames):
            for chunk in _chunks(height):
                torch.sum(g[frame, chunk] * o[frame, chunk], dim=2, keepdim=True, out=delta[frame, chunk])
            rows = [x[frame] for x in tensors]
            for chunk in _chunks(height):
                _line_backward(True, *(x[chunk] for x in rows))
            columns = [x.transpose(0, 1) for x in rows]
            for chunk in _chunks(width):
                _line_backward(False, *(x[chunk] for x in columns))
        if frames > 1:
            for y in range(height):  # W lines through time
                _line_backward(False, *(x[:, y].transpose(0, 1) for x in tensors))
        for x, sample in ((dquery, dq), (dkey, dk), (dvalue, dv)):
            _store(x, index, sample)
    return dquery, dkey, dvalue


def _line_backward(
    is_row: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """The part of L lines of N positions in the gradients; all tensors are (L,N,·).

    Rows come first and overwrite dquery, dkey and dvalue, other lines are added. A position attends to itself
    in its row only.
    """
    store = Tensor.copy_ if is_row else Tensor.add_
    attention = (query @ key.transpose(1, 2)).sub_(lse).exp_()  # (L,N,N)
    if not is_row:
        attention.diagonal(dim1=1, dim2=2).zero_()
    store(dvalue, attention.transpose(1, 2) @ grad)
    denergy = (grad @ value.transpose(1, 2)).sub_(delta).mul_(attention)
    store(dquery, denergy @ key)
    store(dkey, denergy.transpose(1, 2) @ query)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """(L,M,N) @ (L,N,C) → (L,M,C).

    In fp32 on several CPU threads as a convolution with L groups: oneDNN, which PyTorch asks then, is up to
    1.6 times as fast at this as MKL's batched product, which runs at half rate on AMD.
    """
    on_cpu = values.device.type == "cpu" and torch.get_num_threads() > 1
    if not on_cpu or values.dtype != torch.float32 or not values.numel():
        return weights @ values
    lines, rows, positions = weights.shape
    channels = values.reshape(1, lines * positions, -1)
    return F.conv1d(channels, weights.reshape(lines * rows, positions, 1), groups=lines).view(lines, rows, -1)


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + LINES_PER_CHUNK) for start in range(0, length, LINES_PER_CHUNK))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of energies, sums and the log-sum-exp: fp32 for half types, else the tensor's own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def empty_channels_last(x: Tensor) -> Tensor:
    """An uninitialised tensor like ``x``, in the channels-last format of its rank."""
    memory_format = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty_like(x, memory_format=memory_format)


def _sample(x: Tensor, index: int) -> Tensor:
    """A sample of x as contiguous (T,H,W,C) in fp32 or fp64: a view where x is already like that."""
    sample = x[index].movedim(0, -1).to(accumulation_dtype(x)).contiguous()
    return sample if x.dim() == 5 else sample.unsqueeze(0)


def _store(x: Tensor, index: int, sample: Tensor) -> None:
    """Write a computed (T,H,W,C) sample back, unless it is a view of x's own memory."""
    if sample.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        x[index] = sample.view(*x.shape[2:], -1).movedim(-1, 0)
