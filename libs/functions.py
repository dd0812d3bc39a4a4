"""The formula of activated batch normalisation, y = φ(x̂ · (|weight| + eps) + bias), in PyTorch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, autograd
from torch.nn import functional as F

ACTIVATIONS = ("leaky_relu", "elu", "identity")


def activate(x: Tensor, activation: str, param: float) -> Tensor:
    """φ(x): leaky ReLU of slope ``param``, ELU of scale ``param``, or x itself."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope=param)
    if activation == "elu":
        return F.elu(x, alpha=param)
    return x


def scale_of(weight: Tensor | None, eps: float) -> Tensor | None:
    """InPlace-ABN's scale |weight| + eps (Rota Bulò et al., CVPR 2018, section 3.2), or None without affine.

    It is positive in training and in inference, so a checkpoint trained with it gives other numbers in a
    plain BatchNorm wherever a weight is negative.
    """
    return None if weight is None else weight.abs() + eps


class AllGather(autograd.Function):
    """The vectors (N,) of all processes, stacked (P,N); the gradient is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, vector, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def synchronized_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Batch normalisation in training with the statistics of all processes, as if they held one batch.

    Every process sends mean, biased variance and count of its own part; the parts may differ in size.
    The collective is differentiable, so autograd exchanges the gradients as well.

    Args:
        x: (B,C,…) this process's part of the batch.
        running_mean, running_var: (C,) updated in place, the variance with the unbiased estimate.
    """
    channels = x.shape[1]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = [dim for dim in range(x.dim()) if dim != 1]
    var, mean = torch.var_mean(wide, dim=dims, correction=0)
    count = mean.new_full((1,), x.numel() / channels)
    parts = AllGather.apply(torch.cat((mean, var, count)), group)
    means, variances, counts = parts.split((channels, channels, 1), dim=1)

    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean) ** 2) * counts).sum(0) / total
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)

    factor = torch.rsqrt(var + eps) if scale is None else torch.rsqrt(var + eps) * scale
    offset = -mean * factor if bias is None else bias - mean * factor
    per_channel = (1, channels) + (1,) * (x.dim() - 2)
    return (wide * factor.view(per_channel) + offset.view(per_channel)).to(x.dtype)
