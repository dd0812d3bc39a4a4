"""State dicts of other codes and ours: the reference's names, plain BatchNorm, torchvision's weights."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from libs import ABN
from networks.resnet import Backbone


def use_reference_names(module: nn.Module) -> None:
    """Store and load a module's entries under the names of its ``state_names``.

    ``state_names`` maps attributes to the names they have in a state dict; "" leaves the attribute out.
    The hooks are public and plain functions, so that they go along with copies, pickles and replicas.
    """
    module.register_state_dict_post_hook(_to_reference)
    module.register_load_state_dict_pre_hook(_from_reference)
    module.register_load_state_dict_post_hook(_report_reference)


def reference_name(module: nn.Module, name: str) -> str:
    """The name in the state dict of an entry that is called ``name`` by the module's attributes."""
    for attribute, stored in _state_names(module).items():
        if name.startswith(attribute + "."):
            rest = name[len(attribute) + 1 :]
            return f"{stored}.{rest}" if stored else rest
    return name


def _own_name(module: nn.Module, name: str) -> str:
    """The inverse of ``reference_name``."""
    unnamed = None
    for attribute, stored in _state_names(module).items():
        if not stored:
            unnamed = attribute
        elif name.startswith(stored + "."):
            return attribute + name[len(stored) :]
    children = {child for child, _ in module.named_children()}
    if unnamed is not None and name.split(".", 1)[0] not in children:
        return f"{unnamed}.{name}"
    return name


def _state_names(module: nn.Module) -> dict[str, str]:
    names: Any = module.state_names
    return dict(names)


def _to_reference(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)  # and in again, so that the order stays
        state[prefix + reference_name(module, name[len(prefix) :])] = value


def _from_reference(module: nn.Module, state: dict[str, Tensor], prefix: str, *_others: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)
        state[prefix + _own_name(module, name[len(prefix) :])] = value


def _report_reference(module: nn.Module, incompatible: Any) -> None:
    """What is missing or unexpected, by the names that the state dict has."""
    renamed = [(path, x) for path, x in module.named_modules() if hasattr(x, "state_names")]
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        for path, part in reversed(renamed):  # the innermost first, as they were stored
            prefix = f"{path}." if path else ""
            names[:] = [
                prefix + reference_name(part, name[len(prefix) :]) if name.startswith(prefix) else name
                for name in names
            ]


BATCH_NORM_EPS = 1e-5  # of PyTorch's layer, as other codes have it
# torchvision's normalisation of an image in 0..1, RGB
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_torchvision(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of a ResNet, for a backbone with the plain stem: the same features.

    Names are the same. The first convolution takes our input instead of torchvision's; that is exact except
    where zero padding touches, since zero is another colour then. BatchNorm's weights, which may be negative,
    become weights of ABN, which scales by |weight| + eps.

    Args:
        state: its entries; those of the backbone are converted, others are left out.
        backbone: whose ``mean``, ``std`` and ``channel_order`` say what our input is.
    """
    state = {name: x.float() for name, x in state.items() if name in backbone.state_dict()}
    if {"conv1.weight", "bn1.running_mean", "bn1.running_var"} <= set(state):
        state |= _stem_for_our_input(state, backbone)
    return from_batch_norm(state, {f"{name}." for name, x in backbone.named_modules() if isinstance(x, ABN)})


def _stem_for_our_input(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """conv((rgb/255 - mean)/std), with its running statistics, as a convolution of our normalised pixels.

    A channel of torchvision's input is a·x + b of ours: a goes into the weights, the sum of b times the
    weights, which is the same everywhere, off the running mean.

    Our pixels are some 57 times as large, so the weights would be as much smaller. The normalisation hides
    it, but a step of SGD would change them, relative to their size, 57² times as much, and lose the trained
    filters at once. So weights and statistics are multiplied until the weights have torchvision's size.
    """
    our_mean, our_std = torch.tensor([backbone.mean, backbone.std], dtype=torch.float64)
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=torch.float64)
    weight, running_mean, running_var = (
        state[name].double() for name in ("conv1.weight", "bn1.running_mean", "bn1.running_var")
    )
    if backbone.channel_order == "BGR":
        weight, mean, std = weight.flip(1), mean.flip(0), std.flip(0)
    offset = weight.sum((2, 3)) @ ((our_mean / 255 - mean) / std)
    converted = weight * (our_std / (255 * std))[:, None, None]
    size = weight.norm() / converted.norm()
    return {
        "conv1.weight": (size * converted).float(),
        "bn1.running_mean": (size * (running_mean - offset)).float(),
        "bn1.running_var": (size**2 * (running_var + BATCH_NORM_EPS) - BATCH_NORM_EPS).float(),
    }


def norm_of_conv(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The convolutions of a state dict in the reference's names, each with the normalisation after it."""
    norms = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
    pairs = {re.sub(r"\.1$", ".0", re.sub(r"bn(\d)$", r"conv\1", norm)): norm for norm in norms}
    return {conv: norm for conv, norm in pairs.items() if f"{conv}.weight" in state and conv != norm}


def from_batch_norm(state: Mapping[str, Tensor], norms: Collection[str]) -> dict[str, Tensor]:
    """A state dict in the reference's names with BatchNorm, for ABN in its place: the same function.

    BatchNorm's weights may be negative or smaller than eps, where ABN scales by |weight| + eps. The sign of
    a negative weight goes into the convolution before, and so does what makes a weight below eps smaller than
    ABN's smallest scale.

    Args:
        norms: prefixes ("bn1.") of the entries that are BatchNorm's.
    """
    converted = dict(state)
    for conv, norm in norm_of_conv(state).items():
        names = (f"{conv}.weight", f"{norm}.weight", f"{norm}.running_mean")
        if f"{norm}." not in norms or not all(name in state for name in names):
            continue
        weight, scale, mean = (state[name].float() for name in names)
        factor = scale.sign() * (scale.abs() / BATCH_NORM_EPS).clamp(max=1)
        converted[names[0]] = weight * factor[:, None, None, None]
        converted[names[1]] = (scale.abs() - BATCH_NORM_EPS).clamp(min=0)
        converted[names[2]] = mean * factor
        if f"{conv}.bias" in state:
            converted[f"{conv}.bias"] = state[f"{conv}.bias"] * factor
    return converted
