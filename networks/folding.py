"""Networks for inference only: normalisation as part of the convolutions before it."""

import copy
from collections import Counter
from itertools import pairwise
from types import FunctionType
from typing import Any

from torch import nn

from libs import ABN, activation_of, fold


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy of a network in which each ABN is part of the convolution before it; for evaluation.

    Pairs are those that modules declare as ``norm_pairs`` and the neighbours in a Sequential; an ABN anywhere
    else, as in a block that normalises before it convolves, stays as it is. Of a layer with an activation,
    the activation stays. Outputs agree to rounding (1e-5 in fp32).
    """
    folded = copy.deepcopy(model).eval()
    places = Counter(id(module) for _, module in folded.named_modules(remove_duplicate=False))
    pairs: list[tuple[nn.Module, str, str, Any, Any]] = []
    for module in folded.modules():
        for conv_name, norm_name in norm_pairs(module):
            conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
            if type(conv) is nn.Conv2d and isinstance(norm, ABN):
                pairs.append((module, conv_name, norm_name, conv, norm))
    # A set: a Sequential may list a pair that its parent names too.
    partners = Counter(layer for pair in {(id(conv), id(norm)) for *_, conv, norm in pairs} for layer in pair)
    for module, conv_name, norm_name, conv, norm in pairs:
        # A layer that has a second place or partner does not belong to this pair alone.
        if all(places[id(layer)] == partners[id(layer)] == 1 for layer in (conv, norm)):
            module.set_submodule(conv_name, fold(conv, norm))
            module.set_submodule(norm_name, activation_of(norm))
    return folded


def norm_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """The names of a module's convolutions and of the normalisation that follows directly on each.

    A subclass that changes how its layers are run does not inherit what its parent declared.
    """
    if type(module).forward is nn.Sequential.forward:
        return list(pairwise(name for name, _ in module.named_children()))
    for cls in type(module).__mro__:
        if "norm_pairs" in vars(cls):
            return list(module.norm_pairs)  # type: ignore[arg-type]
        if any(isinstance(x, FunctionType) for name, x in vars(cls).items() if name != "__init__"):
            return []
    return []
