"""The four steps of in-place activated batch normalisation as operators, and what serves without kernels.

A step of training is ``statistics`` and ``normalize_`` forward, ``sums`` and ``gradient`` backward. Between
the two of each lies what participants of a synchronised layer exchange: vectors of C numbers. Compiled
kernels register under the same schemas for their device and take precedence there.

With x̂ = (x - mean) / √(var + eps):   z = x̂ · (|weight| + eps) + bias,   y = φ(z).
Statistics, weight and bias are fp32 for half types (fp64 for fp64).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from libs import native

torch.library.define("libs::statistics", "(Tensor x) -> (Tensor mean, Tensor var)")
torch.library.define(
    "libs::normalize_",
    "(Tensor(a!) x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, str activation, "
    "float param) -> ()",
)
torch.library.define(
    "libs::sums",
    "(Tensor grad, Tensor y, Tensor? weight, Tensor? bias, float eps, str activation, float param) "
    "-> (Tensor sum_dz, Tensor sum_dz_xhat)",
)
torch.library.define(
    "libs::gradient",
    "(Tensor grad, Tensor y, Tensor var, Tensor? weight, Tensor? bias, Tensor mean_dz, Tensor mean_dz_xhat, "
    "float eps, str activation, float param) -> Tensor",
)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of x (B,C,…)."""
    var, mean = torch.var_mean(_wide(x), dim=[dim for dim in range(x.dim()) if dim != 1], correction=0)
    return mean, var


def normalize_(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> None:
    """Overwrite x (B,C,…) with y = φ(x̂ · (|weight| + eps) + bias)."""
    factor = torch.rsqrt(var + eps) * _scale(weight, var, eps)
    offset = -mean * factor if bias is None else bias - mean * factor
    wide = _wide(x)  # x itself, but for half types
    wide.mul_(_view(factor, x)).add_(_view(offset, x))
    if activation == "leaky_relu":
        F.leaky_relu_(wide, negative_slope=param)
    elif activation == "elu":
        F.elu_(wide, alpha=param)
    if wide is not x:
        x.copy_(wide)


def sums(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> tuple[Tensor, Tensor]:
    """Σ dz and Σ dz · x̂ of each channel (C,): the gradients of the bias and of the scale."""
    dz, xhat = _invert(grad, y, weight, bias, eps, activation, param)
    dims = [dim for dim in range(y.dim()) if dim != 1]
    return dz.sum(dims), dz.mul_(xhat).sum(dims)


def gradient(
    grad: Tensor,
    y: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    eps: float,
    activation: str,
    param: float,
) -> Tensor:
    """dx = (|weight| + eps) / √(var + eps) · (dz - mean_dz - x̂ · mean_dz_xhat); both means 0 in inference."""
    dz, xhat = _invert(grad, y, weight, bias, eps, activation, param)
    factor = torch.rsqrt(var + eps) * _scale(weight, var, eps)
    dz.sub_(_view(mean_dz, y)).sub_(xhat.mul_(_view(mean_dz_xhat, y))).mul_(_view(factor, y))
    return dz.to(y.dtype)


def _invert(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> tuple[Tensor, Tensor]:
    """dz = dy · φ'(z) and x̂, recovered from y."""
    wide, dz = _wide(y), _wide(grad)
    if activation == "leaky_relu":
        z = torch.where(wide > 0, wide, wide / param)
        dz = torch.where(wide > 0, dz, dz * param)
    elif activation == "elu":
        # Where the exponential has been rounded away, z is not known but finite, and dz is 0.
        tiny = torch.finfo(wide.dtype).eps
        z = torch.where(wide > 0, wide, torch.log1p((wide / param).clamp(min=tiny - 1)))
        dz = torch.where(wide > 0, dz, dz * (wide + param))
    else:
        z, dz = wide.clone(), dz.clone()
    if bias is not None:
        z.sub_(_view(bias, y))
    if weight is not None:
        z.div_(_view(_scale(weight, weight, eps), y))
    return dz, z


def _scale(weight: Tensor | None, like: Tensor, eps: float) -> Tensor:
    return torch.ones_like(like) if weight is None else weight.abs() + eps


def _view(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


for _function in (statistics, normalize_, sums, gradient):
    torch.library.impl(f"libs::{_function.__name__}", "CompositeExplicitAutograd", _function)
_WHY_NOT_NATIVE = native.load()


def backend() -> str:
    """Which implementation of In-Place ABN serves on the CPU and on CUDA, and why not a faster one."""
    return f"CPU: {implementation('cpu')}; CUDA: {implementation('cuda')}"


def implementation(device_type: str) -> str:
    """What ``backend`` says of one device, "cpu" or "cuda"."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no GPU visible to PyTorch"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("libs::normalize_", device_type.upper()):
        return f"PyTorch path ({_WHY_NOT_NATIVE or 'the compiled kernels were built without CUDA'})"
    return f"C++, {native.instruction_set()}" if device_type == "cpu" else "CUDA kernels"


@torch.library.register_fake("libs::statistics")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    kind = _wide(x).dtype
    return x.new_empty(x.shape[1], dtype=kind), x.new_empty(x.shape[1], dtype=kind)


@torch.library.register_fake("libs::normalize_")
def _(x: Tensor, *_: object) -> None: ...


@torch.library.register_fake("libs::sums")
def _(grad: Tensor, y: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    kind = _wide(y).dtype
    return y.new_empty(y.shape[1], dtype=kind), y.new_empty(y.shape[1], dtype=kind)


@torch.library.register_fake("libs::gradient")
def _(grad: Tensor, y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(y)
