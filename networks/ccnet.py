"""CCNet: a dilated ResNet, the recurrent criss-cross head and an auxiliary head."""

from torch import Tensor, nn

from networks.dropout import SampleDropout2d
from networks.rcca import RCCAHead
from networks.resnet import DilatedResNet, Norm


class CCNet(DilatedResNet):
    """The whole network. The backbone's layers are its own, so the state dict has the reference's names.

    Args:
        num_classes: channels of the logits.
        backbone: a key of ``networks.resnet.ARCHITECTURES``.
        recurrence: rounds of criss-cross attention.
        backbone_norm, head_norm: make the normalisation layers without and with their activation.
        checkpoint_activations: compute the backbone's activations twice instead of holding them.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        recurrence: int,
        backbone_norm: Norm,
        head_norm: Norm,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(backbone, backbone_norm, checkpoint_activations)
        layer3_channels, layer4_channels = self.channels
        self.head = RCCAHead(layer4_channels, num_classes, recurrence, head_norm)
        channels = layer3_channels // 2
        self.dsn = nn.Sequential(
            nn.Conv2d(layer3_channels, channels, 3, padding=1),  # with bias, as in the reference
            head_norm(channels),
            SampleDropout2d(0.1, stream=1),
            nn.Conv2d(channels, num_classes, 1),
        )

    def forward(self, images: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        """Images (B,3,H,W) in BGR, 0..255 minus the mean → {"out": logits (B,num_classes,~H/8,~W/8)}.

        In training also "aux", the auxiliary head's logits of the same shape. With ``keys`` (B,), int64 in
        0 … 2³²-1, dropout depends on them instead of on PyTorch's generator.
        """
        layer3, layer4 = self.features(images)
        outputs = {"out": self.head(layer4, keys)}
        if self.training:
            conv, norm, dropout, classify = self.dsn
            outputs["aux"] = classify(dropout(norm(conv(layer3)), keys))
        return outputs
