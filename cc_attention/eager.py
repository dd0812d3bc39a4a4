"""Forward and backward in plain PyTorch, lean: a few lines are worked on at a time.

Each image is handled as a (H,W,C) array, which a channels-last tensor is without a copy: a row of it is a
matrix of leading dimension C, a column one of leading dimension W·C. Both go to batched matrix products as
they are. The softmax over row and column together is one log-sum-exp, which the backward pass uses to
recompute the attention instead of loading it. (Paper: section 3.1.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cc_attention.reference import without_autocast

# Lines whose products are in flight at a time: their tile of C·LINES·97 floats stays in the cache.
LINES = 12


@without_autocast
def forward(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """Criss-cross attention and its log-sum-exp.

    Args:
        query, key: (B,Cr,H,W).
        value: (B,C,H,W).
        tf32: for kernels of our own; PyTorch's products know its settings themselves.

    Returns:
        out (B,C,H,W), channels-last, of the value's dtype; lse (B,H,W) in fp32 (fp64 for fp64).
    """
    out = torch.empty_like(value, memory_format=torch.channels_last)
    batch, _, height, width = value.shape
    lse = torch.empty((batch, height, width), dtype=wide_dtype(value), device=value.device)
    if lse.numel() == 0:  # no positions: a maximum over none does not exist
        return out, lse
    for index in range(batch):
        q, k, v = _image(query, index), _image(key, index), _image(value, index)
        out_image = _image(out, index)
        row = q @ k.transpose(1, 2)  # (H,W,W)
        column = q.transpose(0, 1) @ k.permute(1, 2, 0)  # (W,H,H)
        # The column's energy of the own position equals the row's, so it cannot disturb the maximum;
        # once the exponential is taken it is set to zero, for the row has it already.
        maximum = torch.maximum(row.amax(dim=2), column.amax(dim=2).T)
        row = row.sub_(maximum.unsqueeze(2)).exp_()
        column = column.sub_(maximum.T.unsqueeze(2)).exp_()
        column.diagonal(dim1=1, dim2=2).zero_()
        total = row.sum(dim=2).add_(column.sum(dim=2).T)
        lse[index] = maximum + total.log()
        row.div_(total.unsqueeze(2))
        column.div_(total.T.unsqueeze(2))

        for part in _parts(height):
            out_image[part] = _product(row[part], v[part])
        del row  # makes room for the columns' copies
        for part in _parts(width):
            out_image[:, part] += _product(column[part], v[:, part].transpose(0, 1)).transpose(0, 1)
        _store(out, index, out_image)
    return out, lse


@without_autocast
def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, channels-last, from the gradient of ``out``.

    With P the attention and dP = grad · valueᵀ: dE = P ∘ (dP - δ), δ = Σ P ∘ dP = Σ_c grad ∘ out.
    """
    dquery, dkey, dvalue = (
        torch.empty_like(x, memory_format=torch.channels_last) for x in (query, key, value)
    )
    if lse.numel() == 0:
        return dquery, dkey, dvalue
    for index in range(value.shape[0]):
        q, k, v = _image(query, index), _image(key, index), _image(value, index)
        g, o, z = _image(grad, index), _image(out, index), lse[index].unsqueeze(2)
        dq, dk, dv = _image(dquery, index), _image(dkey, index), _image(dvalue, index)
        height, width = v.shape[:2]
        delta = torch.cat([(g[part] * o[part]).sum(dim=2, keepdim=True) for part in _parts(height)])
        rows = [q, k, v, g, z, delta, dq, dk, dv]
        for part in _parts(height):
            _line_backward(True, *(x[part] for x in rows))
        columns = [x.transpose(0, 1) for x in rows]
        for part in _parts(width):
            _line_backward(False, *(x[part] for x in columns))
        for x, image in ((dquery, dq), (dkey, dk), (dvalue, dv)):
            _store(x, index, image)
    return dquery, dkey, dvalue


def _line_backward(
    own: bool,
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

    Rows come first and overwrite dquery, dkey and dvalue, columns are added. A position attends to itself
    in its row (``own``) and not in its column.
    """
    store = Tensor.copy_ if own else Tensor.add_
    attention = (query @ key.transpose(1, 2)).sub_(lse).exp_()  # (L,N,N)
    if not own:
        attention.diagonal(dim1=1, dim2=2).zero_()
    store(dvalue, attention.transpose(1, 2) @ grad)
    denergy = (grad @ value.transpose(1, 2)).sub_(delta).mul_(attention)
    store(dquery, denergy @ key)
    store(dkey, denergy.transpose(1, 2) @ query)


def _product(weights: Tensor, values: Tensor) -> Tensor:
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


def _parts(length: int) -> Iterator[slice]:
    return (slice(start, start + LINES) for start in range(0, length, LINES))


def wide_dtype(x: Tensor) -> torch.dtype:
    """What is computed and kept in: fp32 for half types, for energies do not fit into them."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _image(x: Tensor, index: int) -> Tensor:
    """One image of (B,C,H,W) as contiguous (H,W,C) in fp32 or fp64: a view where x is already like that."""
    return x[index].permute(1, 2, 0).to(wide_dtype(x)).contiguous()


def _store(x: Tensor, index: int, image: Tensor) -> None:
    """Write a computed (H,W,C) image back, unless it is a view of x's own memory."""
    if image.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        x[index] = image.permute(2, 0, 1)
