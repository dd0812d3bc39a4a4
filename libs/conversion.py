"""Freeze ABN, fold it into convolutions, or convert it to BatchNorm."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from libs.functions import scale_of
from libs.modules import ABN


def freeze(module: nn.Module) -> None:
    """Fix statistics and affine parameters of all ABN and BatchNorm layers, also after ``module.train()``.

    There is no way back but to build the network anew.
    """
    for layer in module.modules():
        if isinstance(layer, ABN):
            layer.freeze()
        elif isinstance(layer, _BatchNorm):
            layer.requires_grad_(False).eval()
            if _to_evaluation not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_to_evaluation)


def _to_evaluation(layer: nn.Module, _: object) -> None:
    layer.eval()


def activation_of(layer: ABN) -> nn.Module:
    """The layer's activation alone."""
    if layer.activation == "leaky_relu":
        return nn.LeakyReLU(layer.activation_param)
    if layer.activation == "elu":
        return nn.ELU(layer.activation_param)
    return nn.Identity()


def to_batch_norm(layer: ABN) -> nn.Module:
    """A plain BatchNorm2d, whose weight is |weight| + eps, and the activation: the same numbers."""
    norm = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
    norm.to(layer.running_mean)
    state = dict(layer.state_dict(), num_batches_tracked=torch.tensor(0))
    if layer.weight is not None:
        state["weight"] = layer.weight.detach().abs() + layer.eps
    norm.load_state_dict(state)
    for name, parameter in norm.named_parameters():
        parameter.requires_grad_(getattr(layer, name).requires_grad)
    norm.train(layer.training)
    if layer.frozen:
        freeze(norm)
    return norm if layer.activation == "identity" else nn.Sequential(norm, activation_of(layer))


def replace_by_batch_norm(module: nn.Module) -> nn.Module:
    """``to_batch_norm`` for all ABN layers within a module, which is changed and returned.

    A layer that is used in several places stays one layer. For an ABN itself its replacement is returned.
    """
    replaced: dict[ABN, nn.Module] = {}

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, ABN):
            if module not in replaced:
                replaced[module] = to_batch_norm(module)
            return replaced[module]
        for name, child in module._modules.items():  # named_children() leaves repeated ones out
            if child is not None:
                setattr(module, name, replace(child))
        return module

    return replace(module)


def fold(conv: nn.Conv2d, layer: ABN) -> nn.Conv2d:
    """A convolution that does what ``conv`` and then the affine map of ``layer`` do in inference.

    The layer's activation remains to be applied.

    Raises:
        ValueError: not an nn.Conv2d, or one whose channels are not the layer's.
    """
    if type(conv) is not nn.Conv2d or conv.out_channels != layer.num_features:
        raise ValueError(f"an ABN of {layer.num_features} channels cannot be folded into {conv}")
    factor = torch.rsqrt(layer.running_var + layer.eps)
    scale = scale_of(layer.weight, layer.eps)
    factor = factor if scale is None else factor * scale
    offset = -layer.running_mean * factor if layer.bias is None else layer.bias - layer.running_mean * factor

    def parameter(x: Tensor) -> nn.Parameter:
        return nn.Parameter(x.detach(), requires_grad=False)

    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
        device="meta",  # no weights are drawn: evaluating in the midst of a run must not change it
    )
    folded.weight = parameter(conv.weight * factor.view(-1, 1, 1, 1))
    folded.bias = parameter(offset if conv.bias is None else conv.bias * factor + offset)
    return folded.train(conv.training)
