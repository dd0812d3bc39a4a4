"""Base class of all heads: dropout by key, classifier, features for a loss."""

from typing import ClassVar

from torch import Tensor, nn

from networks.layers import Norm, SampleDropout2d, norm_layers
from networks.names import use_reference_names

DROPOUT = 0.1


class Head(nn.Module):
    """Backbone features → logits. A subclass builds its layers, its classifier, and defines ``features``:

        class MyHead(Head):
            def __init__(self, in_channels: int, num_classes: int, norm: Norm) -> None:
                super().__init__()
                self.reduce = conv_norm(conv3x3(in_channels, 256), norm)
                self.add_classifier(256, num_classes)

            def features(self, x):
                return self.reduce(x)

    Attributes:
        options: fields of NetworkConfig that the constructor takes as keywords; other heads refuse them.
        has_attention: whether there is criss-cross attention to look at.
        needs_two_images: whether training needs at least two images, as an image's mean is normalised.
        embedded_channels: of the features that a loss sees; those of the classifier's input unless changed.
        state_names: attributes that have another name in the state dict, see ``networks.names``.
    """

    options: ClassVar[tuple[str, ...]] = ()
    state_names: ClassVar[dict[str, str]] = {}
    has_attention = False
    needs_two_images: ClassVar[bool] = False
    classifier: nn.Conv2d
    embedded_channels: int

    def __init__(self) -> None:
        super().__init__()
        use_reference_names(self)

    def add_classifier(self, channels: int, num_classes: int, dropout_stream: int = 0) -> None:
        """The head's last layers; to be called at the end of a subclass's constructor.

        Args:
            channels: of what ``features`` returns.
            dropout_stream: heads with different streams drop different channels of the same sample.
        """
        self.embedded_channels = channels
        self.dropout = SampleDropout2d(DROPOUT, dropout_stream)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def features(self, x: Tensor) -> Tensor:
        """The backbone's features (B,in_channels,h,w) → what the classifier sees (B,C,h,w).

        Override this, or ``encode`` where a loss should see something else.
        """
        raise NotImplementedError

    def encode(self, x: Tensor, frames: int = 1) -> tuple[Tensor, Tensor]:
        """What the classifier sees, and what a loss on features sees: both are ``features(x)``.

        To be overridden where the two differ, or where a head looks across the frames of a clip.

        Args:
            x: (B·frames,in_channels,h,w), the frames of a clip one after another.
        """
        features = self.features(x)
        return features, features

    def forward(self, x: Tensor, keys: Tensor | None = None, frames: int = 1) -> dict[str, Tensor]:
        """Features (B·frames,in_channels,h,w), their samples' keys → {"out": logits, "features": for a loss}.

        Args:
            keys: int64 (B·frames,) in 0 … 2³²-1, what dropout depends on; without, on PyTorch's generator.

        Raises:
            ValueError: the subclass's features have another number of axes.
        """
        seen, embedded = self.encode(x, frames)
        if seen.dim() != 4:
            raise ValueError(f"{type(self).__name__}: features must be (B,C,h,w), got {tuple(seen.shape)}")
        return {"out": self.classifier(self.dropout(seen, keys)), "features": embedded}


class AuxiliaryHead(Head):
    """The deep supervision on the backbone's last stage but one: one 3×3 convolution and a classifier.

    Args:
        channels: of the convolution's output; 0: half of ``in_channels``.
    """

    state_names: ClassVar[dict[str, str]] = {"conv": "0", "norm": "1", "classifier": "3"}
    norm_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("conv", "norm"),)

    def __init__(self, in_channels: int, num_classes: int, norm: Norm, channels: int = 0) -> None:
        super().__init__()
        channels = channels or in_channels // 2
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)  # with bias, as in the reference
        self.norm, *activation = norm_layers(norm, channels)
        self.activation = nn.Sequential(*activation)  # nothing, where the norm has its own
        self.add_classifier(channels, num_classes, dropout_stream=1)

    def features(self, x: Tensor) -> Tensor:
        """(B,in_channels,h,w) → (B,channels,h,w)."""
        return self.activation(self.norm(self.conv(x)))
