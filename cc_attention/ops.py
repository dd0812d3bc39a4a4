"""The operator: argument checks, registration with PyTorch's dispatcher, fake kernels and gradients.

Compiled kernels register under the same two schemas for their device; where none is, ``chunked`` serves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cc_attention import chunked, native, reference

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
    ("criss_cross_attention", chunked.forward),
    ("criss_cross_attention_backward", chunked.backward),
):
    torch.library.impl(f"cc_attention::{_name}", "CompositeExplicitAutograd", _kernel)
# Compiled kernels register under the same schemas for their device and take precedence there.
native.KERNELS.load()


@torch.library.register_fake("cc_attention::criss_cross_attention")
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    lse = value.new_empty((value.shape[0], *value.shape[2:]), dtype=chunked.accumulation_dtype(value))
    return chunked.empty_channels_last(value), lse


@torch.library.register_fake("cc_attention::criss_cross_attention_backward")
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, tf32: bool = False
) -> tuple[Tensor, ...]:
    return tuple(chunked.empty_channels_last(x) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.tf32 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    if not (torch.is_grad_enabled() or _formula_needed()):
        backward = torch.ops.cc_attention.criss_cross_attention_backward
        return *backward(grad, query, key, value, out, lse, ctx.tf32), None
    # This gradient is to be differentiated itself (create_graph=True): it is taken from the formula, through
    # which autograd can go any number of times.
    with torch.enable_grad():
        # Aliases cut the inputs off from each other: where key is computed from query, the gradient of query
        # must not hold what reaches it through key, for autograd adds that itself.
        query, key, value = (x.view_as(x) for x in (query, key, value))
        needed = [x for x, need in zip((query, key, value), ctx.needs_input_grad, strict=True) if need]
        again = reference.criss_cross_attention(query, key, value)
        grads = iter(torch.autograd.grad(again, needed, grad, create_graph=True))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad)  # None for tf32


torch.library.register_autograd(
    "cc_attention::criss_cross_attention", _backward, setup_context=_setup_context
)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each position gathers the values of its row and column, and in a clip of its line through time.

    out[u] = Σ_i softmax_i(query[u] · key[i]) value[i] over the H + W - 1 positions i of the row and column of
    u (paper, section 3.2), or the T + H + W - 2 that share two of its three coordinates (3-D criss-cross
    attention). The own position counts once; the energies are not scaled.

    Args:
        query, key: (B,Cr,H,W) or (B,Cr,T,H,W).
        value: (B,C,H,W) or (B,C,T,H,W). All three of one dtype (fp64, fp32, fp16, bf16), on one device, in
            any memory format; channels-last (channels-last-3d) needs no copy. Autocast casts them to its
            dtype.

    Returns:
        out, of the value's shape and dtype, channels-last (channels-last-3d), differentiable any number of
        times. A position whose energies are all -inf is NaN, as in a softmax. On CUDA, fp32 is computed in
        TF32 where PyTorch's matrix products are (``torch.set_float32_matmul_precision("high")``).

        Second derivatives, function transforms (``torch.func``), forward-mode derivatives and ONNX export
        go through ``reference.criss_cross_attention``, which stores the attention.

    Raises:
        TypeError: no dense tensor, a dtype that is not one of the four, or several dtypes.
        ValueError: ranks, shapes or devices that do not fit together.
    """
    _check_types(query=query, key=key, value=value)
    query, key, value = _autocast(query, key, value)
    _check(query, key, value)
    if _formula_needed():
        return reference.criss_cross_attention(query, key, value)
    return torch.ops.cc_attention.criss_cross_attention(query, key, value, _tf32())[0]


def _constant_in_a_graph(function: Callable[[], bool]) -> Callable[[], bool]:
    """A graph keeps the answer that it was traced with.

    As ``torch.compiler.assume_constant_result``, but that imports the compiler, half of a script's start-up.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _formula_needed() -> bool:
    """Whether the call is one that only plain PyTorch operations can serve.

    Function transforms (torch.func) and forward-mode derivatives pass by the registered gradient, and the
    latter would silently be zero; ONNX has no such operator.
    """
    # A graph that was traced without forward mode is not used within it: the compiler sees this comparison.
    return torch.autograd.forward_ad._current_level >= 0 or _is_transformed_or_exported()


@_constant_in_a_graph
def _is_transformed_or_exported() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.onnx.is_in_onnx_export()


@_constant_in_a_graph
def _tf32() -> bool:
    """Whether PyTorch may multiply fp32 matrices in TF32 on CUDA (torch.set_float32_matmul_precision)."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The attention itself, to be looked at: it takes (T+)H+W numbers a position.

    Args:
        query, key: (B,Cr,H,W) or (B,Cr,T,H,W), as for ``criss_cross_attention``.

    Returns:
        (B,H,W,H+W) or (B,T,H,W,T+H+W), in fp32 or fp64: the weights along each position's line through time,
        its column, then its row. The own position has its weight in the row part and exactly 0 in the others;
        the sum is 1.

    Raises:
        TypeError, ValueError: as ``criss_cross_attention``.
    """
    _check_types(query=query, key=key)
    query, key = _autocast(query, key)
    _check(query, key)
    return reference.attention_weights(query, key)


def backend() -> str:
    """One line: which implementation serves each device, and why not a faster one."""
    return f"CPU: {implementation('cpu')}; CUDA: {implementation('cuda')}"


def implementation(device_type: str) -> str:
    """What ``backend`` says of one device, "cpu" or "cuda"."""
    return native.KERNELS.implementation("cc_attention::criss_cross_attention", device_type)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    # As PyTorch's own products: fp64 stays what it is.
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if x.dtype in castable else x for x in tensors)


def _check_types(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {x.layout}")


def _check(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    for name, x in tensors.items():
        if x.dim() not in (4, 5):
            raise ValueError(f"{name} must be (B,C,H,W) or (B,C,T,H,W); got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16; got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the query's dtype {query.dtype}; got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}; got {x.device}")
    if query.shape != key.shape:
        raise ValueError(f"query and key must agree; got {tuple(query.shape)} and {tuple(key.shape)}")
    if value is not None and (value.shape[0] != query.shape[0] or value.shape[2:] != query.shape[2:]):
        sizes = "B, H and W" if query.dim() == 4 else "B, T, H and W"
        raise ValueError(
            f"query and value must agree in {sizes}; got {tuple(query.shape)} and {tuple(value.shape)}"
        )
