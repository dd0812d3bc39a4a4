"""Networks for inference only."""

import copy
from itertools import pairwise

from torch import nn

from libs import ABN, activation_of, fold


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy of a network in which each ABN is part of the convolution before it; for evaluation.

    Pairs are the neighbours in a Sequential, and conv1 and bn1, conv2 and bn2 … elsewhere. Of a layer with an
    activation, the activation stays. Outputs agree to rounding (1e-5 in fp32).
    """
    folded = copy.deepcopy(model).eval()
    for module in list(folded.modules()):
        names = [name for name, _ in module.named_children()]
        if isinstance(module, nn.Sequential):
            pairs = list(pairwise(names))
        else:
            pairs = [(f"conv{name[2:]}", name) for name in names if name.startswith("bn")]
        for conv_name, norm_name in pairs:
            conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, ABN):
                setattr(module, conv_name, fold(conv, norm))
                setattr(module, norm_name, activation_of(norm))
    return folded
