"""The steps of in-place activated batch normalisation as operators, and the PyTorch path without kernels.

With x̂ = (x - mean) / √(var + eps):   z = x̂ · (|weight| + eps) + bias,   y = φ(z).

A training step is ``statistics`` and ``normalize_`` forward, ``sums`` and ``gradient`` backward. Between the
two of each lies what the members of a synchronised layer exchange: vectors of about 2C numbers. Statistics
are (2C + 1,): means, biased variances, and the number of values in each channel; sums are (2C,): Σ dz and
Σ dz · x̂. They, weight and bias are fp32 for half types and of x's dtype otherwise.

With a ReLU behind the layer z is stored and φ is the identity: ``normalize_relu_`` returns relu(z + shortcut)
beside it, and its backward pass is ``sums`` and ``gradient`` with the activation "relu", or
``sums_add_relu`` and ``gradient`` with "identity" where there is a shortcut.

Compiled kernels register under the same schemas for their device and take precedence there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from libs.native import KERNELS

_AFFINE = "Tensor? weight, Tensor? bias"
_ACTIVATION = "float eps, str activation, float param"

for _schema in (
    "statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) -> Tensor",
    "merge_statistics(Tensor parts, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) "
    "-> Tensor",
    f"normalize_(Tensor(a!) x, Tensor statistics, {_AFFINE}, {_ACTIVATION}) -> ()",
    f"normalize_relu_(Tensor(a!) x, Tensor statistics, {_AFFINE}, Tensor? shortcut, float eps) -> Tensor",
    f"sums(Tensor grad, Tensor y, {_AFFINE}, {_ACTIVATION}) -> (Tensor sums, Tensor dweight)",
    f"sums_add_relu(Tensor grad, Tensor z, Tensor shortcut, {_AFFINE}, float eps) "
    "-> (Tensor sums, Tensor dweight, Tensor dz)",
    f"gradient(Tensor grad, Tensor y, Tensor statistics, Tensor? sums, {_AFFINE}, {_ACTIVATION}) -> Tensor",
):
    torch.library.define(f"libs::{_schema.split('(')[0]}", _schema[_schema.index("(") :])


def statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float) -> Tensor:
    """Statistics (2C + 1,) of x (B,C,…); running statistics, where given, move by ``momentum`` to them."""
    var, mean = torch.var_mean(to_accumulation_dtype(x), dim=_dims(x), correction=0)
    result = torch.cat((mean, var, torch.full_like(mean[:1], x.numel() // x.shape[1])))
    _update(running_mean, running_var, result, momentum)
    return result


def merge_statistics(
    parts: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Tensor:
    """Statistics (2C + 1,) of a batch from those of its parts (P, 2C + 1), which may differ in size."""
    channels = parts.shape[1] // 2
    means, variances, counts = parts.split((channels, channels, 1), dim=1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean) ** 2) * counts).sum(0) / total
    result = torch.cat((mean, var, total))
    _update(running_mean, running_var, result, momentum)
    return result


def _update(
    running_mean: Tensor | None, running_var: Tensor | None, statistics: Tensor, momentum: float
) -> None:
    if running_mean is None or running_var is None:
        return
    mean, var, count = statistics.split((len(running_mean), len(running_mean), 1))
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * count / (count - 1), momentum)


def normalize_(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> None:
    """Overwrite x (B,C,…) with y; ``statistics`` may end after the variances."""
    mean, var = statistics[: x.shape[1]], statistics[x.shape[1] : 2 * x.shape[1]]
    factor = torch.rsqrt(var + eps) * _scale(weight, var, eps)
    offset = -mean * factor if bias is None else bias - mean * factor
    wide = to_accumulation_dtype(x)  # x itself, but for half types
    wide.mul_(per_channel(factor, x)).add_(per_channel(offset, x))
    if activation == "leaky_relu":
        F.leaky_relu_(wide, negative_slope=param)
    elif activation == "elu":
        F.elu_(wide, alpha=param)
    elif activation not in ("relu", "identity"):
        raise ValueError(f"activation must be leaky_relu, elu, relu or identity; got {activation}")
    if wide is not x:
        x.copy_(wide)


def normalize_relu_(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut: Tensor | None,
    eps: float,
) -> Tensor:
    """Overwrite x (B,C,…) with z and return relu(z), or relu(z + shortcut)."""
    normalize_(x, statistics, weight, bias, eps, "identity", 0.0)
    return F.threshold(x, 0.0, 0.0) if shortcut is None else F.relu_(x + shortcut)


def sums(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> tuple[Tensor, Tensor]:
    """Σ dz and Σ dz · x̂ (2C,), of which the first half is the bias's gradient; and the weight's (C,)."""
    dz, xhat = _invert(grad, y, weight, bias, eps, activation, param)
    result = torch.cat((dz.sum(_dims(y)), dz.mul_(xhat).sum(_dims(y))))
    sum_dz_xhat = result[y.shape[1] :]
    return result, sum_dz_xhat.clone() if weight is None else sum_dz_xhat * weight.sign()


def sums_add_relu(
    grad: Tensor, z: Tensor, shortcut: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same behind relu(z + shortcut), and dz, which is the shortcut's gradient as well."""
    dz = torch.empty_like(z).copy_(grad.masked_fill(z + shortcut <= 0, 0.0))
    return *sums(dz, z, weight, bias, eps, "identity", 0.0), dz


def gradient(
    grad: Tensor,
    y: Tensor,
    statistics: Tensor,
    sums: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    param: float,
) -> Tensor:
    """dx = (|weight| + eps) / √(var + eps) · (dz - mean of dz - x̂ · mean of dz · x̂).

    The means are those of all parts: ``sums`` is (2C,) or (P, 2C). Without it, in inference, they are 0.
    """
    channels = y.shape[1]
    var = statistics[channels : 2 * channels]
    dz, xhat = _invert(grad, y, weight, bias, eps, activation, param)
    if sums is not None:
        mean_dz, mean_dz_xhat = mean_sums(sums, statistics)
        dz.sub_(per_channel(mean_dz, y)).sub_(xhat.mul_(per_channel(mean_dz_xhat, y)))
    factor = torch.rsqrt(var + eps) * _scale(weight, var, eps)
    return dz.mul_(per_channel(factor, y)).to(y.dtype)


def mean_sums(sums: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Means of dz and of dz · x̂ (C,) from the sums (2C,) or (P, 2C) of all parts."""
    channels = len(statistics) // 2
    means = sums.view(-1, 2 * channels).sum(0) / statistics[2 * channels :]
    return means[:channels], means[channels:]


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
    wide, dz = to_accumulation_dtype(y), to_accumulation_dtype(grad)
    if activation == "leaky_relu":
        z = torch.where(wide > 0, wide, wide / param)
        dz = torch.where(wide > 0, dz, dz * param)
    elif activation == "elu":
        # Where y has been rounded to -param, z is about the logarithm of that rounding, or less.
        smallest = max(torch.finfo(y.dtype).eps / 4, torch.finfo(wide.dtype).eps / 2)
        z = torch.where(wide > 0, wide, torch.log1p((wide / param).clamp(min=smallest - 1)))
        dz = torch.where(wide > 0, dz, dz * (wide + param))
    else:
        z = wide.clone()
        dz = dz.masked_fill(wide <= 0, 0.0) if activation == "relu" else dz.clone()
    if bias is not None:
        z.sub_(per_channel(bias, y))
    if weight is not None:
        z.div_(per_channel(_scale(weight, weight, eps), y))
    return dz, z


def _scale(weight: Tensor | None, like: Tensor, eps: float) -> Tensor:
    return torch.ones_like(like) if weight is None else weight.abs() + eps


def _dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector (C,) in the shape that broadcasts over x (B,C,…)."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def to_accumulation_dtype(x: Tensor) -> Tensor:
    """x in the dtype that is computed in: fp32 for half types."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


for _function in (
    statistics,
    merge_statistics,
    normalize_,
    normalize_relu_,
    sums,
    sums_add_relu,
    gradient,
):
    torch.library.impl(f"libs::{_function.__name__}", "CompositeExplicitAutograd", _function)
KERNELS.load()


def backend() -> str:
    """Which implementation of In-Place ABN serves on the CPU and on CUDA, and why not a faster one."""
    return f"CPU: {implementation('cpu')}; CUDA: {implementation('cuda')}"


def implementation(device_type: str) -> str:
    """What ``backend`` says of one device, "cpu" or "cuda"."""
    return KERNELS.implementation("libs::normalize_", device_type)


def _empty_vector(x: Tensor, size: int) -> Tensor:
    return x.new_empty(size, dtype=to_accumulation_dtype(x).dtype)


@torch.library.register_fake("libs::statistics")
def _(x: Tensor, *_: object) -> Tensor:
    return _empty_vector(x, 2 * x.shape[1] + 1)


@torch.library.register_fake("libs::merge_statistics")
def _(parts: Tensor, *_: object) -> Tensor:
    return parts.new_empty(parts.shape[1])


@torch.library.register_fake("libs::normalize_")
def _(x: Tensor, *_: object) -> None: ...


@torch.library.register_fake("libs::normalize_relu_")
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("libs::sums")
def _(grad: Tensor, y: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty_vector(y, 2 * y.shape[1]), _empty_vector(y, y.shape[1])


@torch.library.register_fake("libs::sums_add_relu")
def _(grad: Tensor, z: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_vector(z, 2 * z.shape[1]), _empty_vector(z, z.shape[1]), torch.empty_like(z)


@torch.library.register_fake("libs::gradient")
def _(grad: Tensor, y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(y)
