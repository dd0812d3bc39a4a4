"""Recognise a file's network: its config, as the file says or as names and shapes of its weights tell."""

from typing import Any

import torch
from torch import Tensor

from libs import InPlaceABN
from networks.config import FLAT_SETTINGS, NetworkConfig
from networks.mmsegmentation import config_of_mmsegmentation, is_mmsegmentation
from networks.registry import HEADS


def config_of(contents: dict[str, Any], state: dict[str, Tensor], **settings: Any) -> NetworkConfig:
    """The config that a checkpoint holds; of one without, what the shapes of its weights tell.

    Args:
        state: its weights.
        settings: fields in the place of the checkpoint's.

    Raises:
        ValueError: unknown or impossible settings.
    """
    values = {**told_by(contents, state), **settings}
    model = values.get("model", NetworkConfig.model)
    if "recurrence" in settings and model in HEADS and "recurrence" not in HEADS[model].options:
        raise ValueError(f"recurrence is given, model {model} has none")
    return NetworkConfig.from_dict(values)


def told_by(contents: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of NetworkConfig that a file stores, or that the shapes of its weights tell.

    Raises:
        ValueError: it stores something else under that name.
    """
    recipe, flat = contents.get("recipe"), contents.get("settings")
    values = contents.get("network") or (recipe.get("network") if isinstance(recipe, dict) else None)
    if isinstance(values, dict) and any(isinstance(x, Tensor) for x in values.values()):
        values = None  # other programs have their weights there
    if values is None and isinstance(flat, dict):
        values = _config_by_shapes(state) | {name: flat[name] for name in FLAT_SETTINGS if name in flat}
        values["norm"] = "auto"  # numbers do not depend on it, and evaluation needs no synchronisation
    if values is None:
        values = _config_by_shapes(state)
    if not isinstance(values, dict):
        raise ValueError(f"network is {type(values).__name__}, not a dict of settings")
    return values


def _config_by_shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    """The settings of a plain state dict; what its weights do not tell is as published."""
    if is_mmsegmentation(state):
        return config_of_mmsegmentation(state)
    values: dict[str, Any] = {}
    classifier = state.get("head.bottleneck.3.weight", state.get("head.classifier.weight"))
    stem = state.get("conv1.weight")
    if classifier is not None and classifier.dim() == 4:
        values["num_classes"] = classifier.shape[0]
        values["model"] = _head_by_names(state)
    if stem is not None and (kind := stem_by_shape(stem)):
        values["stem"] = kind
    if "layer1.0.conv1.weight" in state and "layer1.0.conv3.weight" not in state:
        values["backbone"] = "resnet18"
    elif "layer3.5.conv3.weight" in state and "layer3.6.conv3.weight" not in state:
        values["backbone"] = "resnet50"
    elif "layer3.22.conv3.weight" in state and "layer3.23.conv3.weight" not in state:
        values["backbone"] = "resnet101"
    return values


def _head_by_names(state: dict[str, Tensor]) -> str:
    """The model whose head has these names; the default if there is none."""
    own = {name.removeprefix("head.") for name in state if name.startswith("head.")}
    for name, head in HEADS.items():
        if head.__module__.startswith("networks."):  # a user's may want other arguments
            with torch.device("meta"):
                names = head(64, 2, InPlaceABN).state_dict().keys()
            if names == own:
                return name
    return NetworkConfig.model


def stem_by_shape(conv1: Tensor) -> str | None:
    """The stem whose first convolution has this weight; None: none that is known."""
    if conv1.shape[2:] == (3, 3):
        return "v1c" if len(conv1) == 32 else "deep"
    return "plain" if conv1.shape[2:] == (7, 7) else None
