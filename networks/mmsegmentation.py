"""CCNet as mmsegmentation 1.x has it (R-50-D8 and R-101-D8): its state dict becomes ours, and ours its.

Besides names, its network differs from the reference's in the stem, the dilation of two blocks, plain
BatchNorm, ReLU in the heads, the auxiliary head's width and the input; NetworkConfig has a field for each.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from networks.names import BATCH_NORM_EPS, from_batch_norm, norm_of_conv

# What decides its network, beside backbone, classes, recurrence, and which layer normalises.
MMSEGMENTATION_NETWORK: dict[str, Any] = {
    "model": "ccnet",
    "stem": "v1c",
    "contracted_dilation": True,
    "head_activation": "relu",
    "auxiliary_channels": 256,
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
    "channel_order": "RGB",
    "align_corners": False,
}


# Beginnings of names, theirs and ours; the first that fits counts.
NAMES: tuple[tuple[str, str], ...] = (
    ("backbone.stem.0.", "conv1."),
    ("backbone.stem.1.", "bn1."),
    ("backbone.stem.3.", "conv2."),
    ("backbone.stem.4.", "bn2."),
    ("backbone.stem.6.", "conv3."),
    ("backbone.stem.7.", "bn3."),
    ("backbone.layer", "layer"),
    ("decode_head.convs.0.conv.", "head.conva.0."),
    ("decode_head.convs.0.bn.", "head.conva.1."),
    ("decode_head.cca.gamma.scale", "head.cca.gamma"),
    ("decode_head.cca.", "head.cca."),
    ("decode_head.convs.1.conv.", "head.convb.0."),
    ("decode_head.convs.1.bn.", "head.convb.1."),
    ("decode_head.conv_cat.conv.", "head.bottleneck.0."),
    ("decode_head.conv_cat.bn.", "head.bottleneck.1."),
    ("decode_head.conv_seg.", "head.bottleneck.3."),
    ("auxiliary_head.convs.0.conv.", "dsn.0."),
    ("auxiliary_head.convs.0.bn.", "dsn.1."),
    ("auxiliary_head.conv_seg.", "dsn.3."),
)
GAMMA = "head.cca.gamma"  # a number there, (1,) here


def is_mmsegmentation(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of mmsegmentation's CCNet."""
    return "decode_head.cca.query_conv.weight" in state


def config_of_mmsegmentation(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of NetworkConfig that a state dict of mmsegmentation needs; R is not in it.

    Raises:
        ValueError: a backbone that is none of its two.
    """
    if "backbone.stem.0.weight" not in state or "backbone.layer1.0.conv3.weight" not in state:
        raise ValueError("of mmsegmentation's CCNet only R-50-D8 and R-101-D8 (ResNetV1c) are known")
    blocks = {name.split(".")[2] for name in state if name.startswith("backbone.layer3.")}
    classifier = state.get("decode_head.conv_seg.weight")
    values = MMSEGMENTATION_NETWORK | {
        "backbone": {6: "resnet50", 23: "resnet101"}.get(len(blocks), f"{len(blocks)} blocks")
    }
    if classifier is not None and classifier.dim() == 4:
        values["num_classes"] = classifier.shape[0]
    return values


def from_mmsegmentation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmsegmentation's state dict under our names: the same function.

    BatchNorm's weights, which may be negative, become those of ABN; the auxiliary head's convolution, which
    has a bias here, gets zeros. Entries that are no part of the network keep their names.
    """
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("data_preprocessor.") or name.endswith("num_batches_tracked"):
            continue
        for their_start, our_start in NAMES:
            if name.startswith(their_start):
                name = our_start + name[len(their_start) :]
                break
        ours[name] = value.reshape(1) if name == GAMMA and value.dim() == 0 else value
    ours = from_batch_norm(ours, {f"{norm}." for norm in norm_of_conv(ours).values()})
    if "dsn.0.weight" in ours:
        ours.setdefault("dsn.0.bias", ours["dsn.0.weight"].new_zeros(len(ours["dsn.0.weight"])))
    return ours


def to_mmsegmentation(model: nn.Module) -> dict[str, Tensor]:
    """A network's state dict for mmsegmentation's CCNet: the same function in evaluation mode.

    The network's config must be ``MMSEGMENTATION_NETWORK``, see ``networks.config.difference``. ABN's scale
    |weight| + eps becomes BatchNorm's weight, and a bias before normalisation, which only the auxiliary
    head's convolution has, goes into the running mean.
    """
    state = {name: x.clone() for name, x in model.state_dict().items() if not name.startswith("embedding.")}
    for conv, norm in norm_of_conv(state).items():
        state[f"{norm}.weight"] = state[f"{norm}.weight"].abs() + BATCH_NORM_EPS
        if (bias := state.pop(f"{conv}.bias", None)) is not None:
            state[f"{norm}.running_mean"] -= bias
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        their_start, our_start = next(pair for pair in NAMES if name.startswith(pair[1]))
        name_there = their_start + name[len(our_start) :]
        theirs[name_there] = value.reshape(()) if name == GAMMA else value
        if name_there.endswith(".running_var"):
            theirs[re.sub("running_var$", "num_batches_tracked", name_there)] = torch.tensor(0)
    return theirs


def class_names(contents: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Any, ...] | None] | None:
    """Names and colours of the classes that one of its files tells; None: it has no names.

    Files of version 1.x have them in ``meta["dataset_meta"]``, earlier ones in ``meta``, in capitals.
    """
    meta = contents.get("meta")
    if not isinstance(meta, dict):
        return None
    newer = meta.get("dataset_meta")
    described = {str(name).lower(): x for name, x in (newer if isinstance(newer, dict) else meta).items()}
    names, palette = described.get("classes"), described.get("palette")
    if not isinstance(names, list | tuple):
        return None
    if not (isinstance(palette, list | tuple) and len(palette) == len(names)):
        return tuple(map(str, names)), None
    return tuple(map(str, names)), tuple(tuple(colour) for colour in palette)
