"""Heads by name: what turns the backbone's features into logits."""

from typing import Any

from networks.heads.aspp import ASPPHead
from networks.heads.base import AuxiliaryHead, Head
from networks.heads.fcn import FCNHead
from networks.heads.gcn import GCNHead
from networks.heads.non_local import NonLocalHead
from networks.heads.psp import PSPHead
from networks.heads.rcca import RCCAHead

# name: a Head's class, called with (in_channels, num_classes, norm) and its options
HEADS: dict[str, Any] = {
    "ccnet": RCCAHead,
    "fcn": FCNHead,
    "pspnet": PSPHead,
    "deeplabv3": ASPPHead,
    "gcn": GCNHead,
    "nonlocal": NonLocalHead,
}

__all__ = ["HEADS", "AuxiliaryHead", "Head"]
