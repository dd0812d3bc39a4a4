"""The operator: argument checks, registration with PyTorch's dispatcher, fake kernels and gradients.

Compiled kernels register under the same two schemas for their device; where none is, ``eager`` serves.
"""

from typing import Any

import torch
from torch import Tensor

from cc_attention import eager, native, reference

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

torch.library.define(
    "cc_attention::criss_cross_attention",
    "(Tensor query, Tensor key, Tensor value, bool tf32=False) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "cc_attention::criss_cross_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, bool tf32=False) "
    "-> (Tensor dquery, Tensor dkey, Tensor dvalue)",
)
for _name, _kernel in (
    ("criss_cross_attention", eager.forward),
    ("criss_cross_attention_backward", eager.backward),
):
    torch.library.impl(f"cc_attention::{_name}", "CompositeExplicitAutograd", _kernel)
# Compiled kernels register under the same schemas for their device and take precedence there.
_WHY_NOT_NATIVE = native.load()


@torch.library.register_fake("cc_attention::criss_cross_attention")
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    batch, _, height, width = value.shape
    out = torch.empty_like(value, memory_format=torch.channels_last)
    return out, value.new_empty((batch, height, width), dtype=eager.wide_dtype(value))


@torch.library.register_fake("cc_attention::criss_cross_attention_backward")
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tf32: bool = False
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.channels_last) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.tf32 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    if not torch.is_grad_enabled():
        backward = torch.ops.cc_attention.criss_cross_attention_backward
        return *backward(grad, query, key, value, out, lse, ctx.tf32), None
    # A graph of this gradient is wanted (create_graph=True): take it from the formula, which autograd can
    # differentiate as often as anyone asks.
    # Aliases cut the inputs off from each other: where key is computed from query, the gradient of query must
    # not hold what reaches it through key, which autograd adds itself.
    query, key, value = (x.view_as(x) for x in (query, key, value))
    needed = [x for x, need in zip((query, key, value), ctx.needs_input_grad, strict=True) if need]
    again = reference.criss_cross_attention(query, key, value)
    grads = iter(torch.autograd.grad(again, needed, grad, create_graph=True))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad)  # none of tf32


torch.library.register_autograd(
    "cc_attention::criss_cross_attention", _backward, setup_context=_setup_context
)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each position gathers the values of its row and column (paper, section 3.1).

    out[u] = Σ_i softmax_i(query[u] · key[i]) value[i] over the H + W - 1 positions i of the row and column
    of u, the own one once; the energies are not scaled.

    Args:
        query, key: (B,Cr,H,W).
        value: (B,C,H,W). All three of one dtype (fp64, fp32, fp16, bf16), on one device, in any memory
            format; channels-last needs no copy. Under autocast they are cast to its dtype.

    Returns:
        (B,C,H,W), channels-last, differentiable any number of times. On CUDA, fp32 is computed in TF32 where
        PyTorch's matrix products are (``torch.set_float32_matmul_precision("high")``).

    Raises:
        TypeError: a dtype that is not one of the four, or several dtypes.
        ValueError: ranks, shapes or devices that do not fit together.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value)
    return torch.ops.cc_attention.criss_cross_attention(query, key, value, _tf32())[0]


@torch.compiler.assume_constant_result
def _tf32() -> bool:
    """Whether PyTorch may multiply fp32 matrices in TF32 on CUDA (torch.set_float32_matmul_precision)."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The attention itself, to be looked at: it takes (H+W)·H·W numbers an image.

    Args:
        query, key: (B,Cr,H,W), as for ``criss_cross_attention``.

    Returns:
        (B,H,W,H+W): the weights along each position's column, then along its row, in fp32 or fp64. The own
        position has its weight in the row part and exactly 0 in the column part; the sum is 1.
    """
    query, key = _autocast(query, key)
    _check(query, key)
    return reference.attention_weights(query, key)


def backend() -> str:
    """Which implementation serves a call on the CPU and on CUDA, and why not a faster one."""
    return f"CPU: {implementation('cpu')}; CUDA: {implementation('cuda')}"


def implementation(device_type: str) -> str:
    """What ``backend`` says of one device, "cpu" or "cuda"."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no GPU visible to PyTorch"
    name, key = "cc_attention::criss_cross_attention", device_type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
        return f"PyTorch path ({_WHY_NOT_NATIVE or 'the compiled kernels were built without CUDA'})"
    return f"C++, {native.instruction_set()}" if device_type == "cpu" else "CUDA kernels"


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    # As PyTorch's own products: fp64 stays what it is.
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if x.dtype in castable else x for x in tensors)


def _check(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must be (B,C,H,W); got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16; got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}; got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}; got {x.device}")
    if query.shape != key.shape:
        raise ValueError(f"query and key must agree; got {tuple(query.shape)} and {tuple(key.shape)}")
    if value is not None and (value.shape[0] != query.shape[0] or value.shape[2:] != query.shape[2:]):
        raise ValueError(
            f"query and value must agree in B, H and W; got {tuple(query.shape)} and {tuple(value.shape)}"
        )
