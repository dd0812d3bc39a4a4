"""The head without a context module: the dilated FCN that the paper starts from."""

from torch import nn

from networks.heads.context import ContextHead
from networks.layers import Norm


class FCNHead(ContextHead):
    """Reduction and fusion only; arguments as in ``ContextHead``."""

    def __init__(self, in_channels: int, num_classes: int, norm: Norm) -> None:
        super().__init__(in_channels, num_classes, norm, nn.Identity())
