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
    for module in list(folded.modules()):
        pairs = [pair for pair in norm_pairs(module) if _can_be_one(*map(module.get_submodule, pair))]
        in_pairs = Counter(name for pair in pairs for name in pair)
        for conv_name, norm_name in pairs:
            conv: Any = module.get_submodule(conv_name)
            norm: Any = module.get_submodule(norm_name)
            # A layer that has a second place or partner does not belong to this pair alone.
            if max(places[id(conv)], places[id(norm)], in_pairs[conv_name], in_pairs[norm_name]) == 1:
                module.set_submodule(conv_name, fold(conv, norm))
                module.set_submodule(norm_name, activation_of(norm))
    return folded


def _can_be_one(conv: nn.Module, norm: nn.Module) -> bool:
    return type(conv) is nn.Conv2d and isinstance(norm, ABN)


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
