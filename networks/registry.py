"""Networks by name. The registries are plain dicts, to which a module of yours may add entries."""

import dataclasses
from functools import partial
from typing import Any

from torch import nn

from networks.config import NetworkConfig
from networks.heads import HEADS, AuxiliaryHead
from networks.layers import NORMS, Norm, with_relu
from networks.resnet import BACKBONES
from networks.segmenter import Segmenter

__all__ = ["BACKBONES", "HEADS", "NORMS", "build_model"]


def build_model(
    name: NetworkConfig | str | None = None,
    *,
    checkpoint_activations: bool = False,
    embedding_channels: int = 0,
    **settings: Any,
) -> Segmenter:
    """A network with PyTorch's default initialisation, as the reference has it.

    Args:
        name: the model, a key of ``HEADS`` (default: "ccnet"); or a NetworkConfig.
        checkpoint_activations: recompute activations in the backward pass: less memory, slower, the same
            numbers; not for ``torch.compile``.
        embedding_channels: of the 1×1 convolution for a loss on features, in training only; 0: none.
        settings: fields of NetworkConfig, in the place of the config's.

    Raises:
        ValueError: an unknown name, a number out of range, an option that the head does not take.
        TypeError: a keyword that NetworkConfig does not have, or both ``name`` and ``model``.
    """
    if isinstance(name, NetworkConfig):
        config = dataclasses.replace(name, **settings)
    elif name is None:
        config = NetworkConfig(**settings)
    else:
        config = NetworkConfig(model=name, **settings)
    layer = NORMS["inplace_abn" if config.norm == "auto" else config.norm]
    backbone_norm = partial(layer, activation="identity")
    head_norm: Norm = partial(layer, activation="leaky_relu", activation_param=0.01)
    if config.head_activation == "relu":
        head_norm = with_relu(partial(layer, activation="identity"))

    contracted = {"contracted_dilation": True} if config.contracted_dilation else {}
    backbone = BACKBONES[config.backbone](
        backbone_norm, stem=config.stem, checkpoint_activations=checkpoint_activations, **contracted
    )
    backbone.mean, backbone.std, backbone.channel_order = config.mean, config.std, config.channel_order
    auxiliary_channels, channels = backbone.channels
    head_class = HEADS[config.model]
    options = {name: getattr(config, name) for name in head_class.options}
    head = head_class(channels, config.num_classes, head_norm, **options)
    auxiliary_head = AuxiliaryHead(
        auxiliary_channels, config.num_classes, head_norm, config.auxiliary_channels
    )
    embedding = nn.Conv2d(head.embedded_channels, embedding_channels, 1) if embedding_channels else None
    model = Segmenter(backbone, head, auxiliary_head, embedding, config.align_corners)
    model.config = config
    return model
