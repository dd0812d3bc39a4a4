"""Global convolution (Peng et al., Large Kernel Matters, CVPR 2017)."""

from torch import Tensor, nn

from networks.heads.context import ContextHead
from networks.layers import Norm

KERNEL = 15


class GlobalConvolution(nn.Module):
    """A 15×15 convolution as the sum of two separable ones: down then across, and across then down.

    Between the two a quarter of the channels is kept. The paper's own module goes down to the number of
    classes, since it is the classifier there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

        def strip(height: int, width: int, in_channels: int, out_channels: int) -> nn.Conv2d:
            return nn.Conv2d(in_channels, out_channels, (height, width), padding=(height // 2, width // 2))

        narrow = channels // 4
        self.left = nn.Sequential(strip(KERNEL, 1, channels, narrow), strip(1, KERNEL, narrow, channels))
        self.right = nn.Sequential(strip(1, KERNEL, channels, narrow), strip(KERNEL, 1, narrow, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) → (B,C,h,w)."""
        return self.left(x) + self.right(x)


class GCNHead(ContextHead):
    """Global convolution as the context module; arguments as in ``ContextHead``."""

    def __init__(self, in_channels: int, num_classes: int, norm: Norm) -> None:
        super().__init__(in_channels, num_classes, norm, GlobalConvolution(in_channels // 4))
