"""The segmentation networks, by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from libs import ABN, InPlaceABN, InPlaceABNSync
from networks.ccnet import CCNet
from networks.inference import fold_norms
from networks.resnet import ARCHITECTURES

MODELS: dict[str, Callable[..., nn.Module]] = {"ccnet": CCNet}
BACKBONES = tuple(ARCHITECTURES)
NORMS: dict[str, type[ABN]] = {"inplace_abn": InPlaceABN, "sync": InPlaceABNSync, "abn": ABN}

# What a backbone file lacks and what it has too much, and the layers that depend on the number of classes.
HEADS = ("head.", "dsn.")
IMAGENET_CLASSIFIER = ("fc.",)
CLASSIFIERS = ("head.bottleneck.3.", "dsn.3.")

__all__ = [
    "BACKBONES",
    "CLASSIFIERS",
    "HEADS",
    "IMAGENET_CLASSIFIER",
    "MODELS",
    "NORMS",
    "build_model",
    "fold_norms",
]


def build_model(
    name: str = "ccnet",
    num_classes: int = 19,
    backbone: str = "resnet101",
    recurrence: int = 2,
    norm: str = "inplace_abn",
    checkpoint_activations: bool = False,
) -> nn.Module:
    """A network with PyTorch's default initialisation (gamma 0), as the reference has it.

    Args:
        name: a key of ``MODELS``.
        num_classes: channels of the logits, at least 1.
        backbone: one of ``BACKBONES``.
        recurrence: rounds R of criss-cross attention, at least 0.
        norm: a key of ``NORMS``.
        checkpoint_activations: hold less and compute more in training; not for ``torch.compile``.

    Returns:
        A module that maps images (B,3,H,W) to a dict with logits "out" at 1/8 and, in training, "aux".

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    for option, value, known in (
        ("name", name, MODELS),
        ("backbone", backbone, BACKBONES),
        ("norm", norm, NORMS),
    ):
        if value not in known:
            raise ValueError(f"{option} is one of {', '.join(known)}; got {value!r}")
    if num_classes < 1 or recurrence < 0:
        raise ValueError(f"need num_classes >= 1 and recurrence >= 0; got {num_classes} and {recurrence}")
    layer = NORMS[norm]
    return MODELS[name](
        num_classes=num_classes,
        backbone=backbone,
        recurrence=recurrence,
        backbone_norm=partial(layer, activation="identity"),
        head_norm=partial(layer, activation="leaky_relu", activation_param=0.01),
        checkpoint_activations=checkpoint_activations,
    )
