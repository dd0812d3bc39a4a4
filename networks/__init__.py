"""The segmentation networks, by name."""

from networks.config import NetworkConfig
from networks.folding import fold_norms
from networks.heads import Head
from networks.pretrained import Start, load_model, read_start, restore_model, settings_from_start, start_from
from networks.registry import BACKBONES, HEADS, NORMS, build_model
from networks.resnet import Backbone
from networks.segmenter import Segmenter

__all__ = [
    "BACKBONES",
    "Backbone",
    "HEADS",
    "Head",
    "NORMS",
    "NetworkConfig",
    "Segmenter",
    "Start",
    "build_model",
    "fold_norms",
    "load_model",
    "restore_model",
    "settings_from_start",
    "read_start",
    "start_from",
]
