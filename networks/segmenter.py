"""A segmentation network: backbone, head and auxiliary head."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from networks.heads import Head
from networks.names import use_reference_names
from networks.resnet import Backbone

# A backbone's entries have no prefix in the state dict, so its modules have other names than these.
RESERVED = {"backbone", "head", "dsn", "auxiliary_head", "embedding"}


class Segmenter(nn.Module):
    """The whole network, whose state dict has the reference's names (``conv1…``, ``head.…``, ``dsn.…``).

    Args:
        backbone: images → (features for the auxiliary head, features for the head).
        head: features → logits.
        auxiliary_head: supervises the backbone in training only.
        embedding: a 1×1 convolution of the head's features for a loss that wants fewer channels; computed in
            training only.
        align_corners: how loss and predictions enlarge the logits.

    Raises:
        ValueError: a module of the backbone has the name of one of the network's own.

    Attributes:
        config: the NetworkConfig that ``build_model`` made it from; None: it was composed by hand.
    """

    config: Any = None

    state_names: ClassVar[dict[str, str]] = {"backbone": "", "auxiliary_head": "dsn"}

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        auxiliary_head: Head,
        embedding: nn.Module | None = None,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        taken = RESERVED & {name.split(".")[0] for name in backbone.state_dict(keep_vars=True)}
        if taken:
            names = ", ".join(sorted(taken))
            raise ValueError(f"a backbone has no modules called {names}; the network's own have these names")
        self.align_corners = align_corners
        self.backbone, self.head, self.auxiliary_head = backbone, head, auxiliary_head
        self.embedding = embedding
        use_reference_names(self)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        """Images (B,3,H,W), or clips (B,3,T,H,W), normalised as ``backbone`` says → a dict of (B·T,…,h,w).

        Frames of a clip follow each other in the results: those of clip b are b·T … b·T+T-1.

        Args:
            keys: (B,), int64 in 0 … 2³²-1: dropout depends on them instead of on PyTorch's generator; the
                frames of a clip share theirs.

        Returns:
            "out": logits (B·T,num_classes,h,w), h = ~H/8. In training also "aux", the auxiliary head's
            logits, "features", what the head shows to a loss, and "embedding" of them, if there is one.
        """
        frames = 1
        if images.dim() == 5:
            frames = images.shape[2]
            images = images.transpose(1, 2).flatten(0, 1)
            keys = None if keys is None else keys.repeat_interleave(frames)
        auxiliary, features = self.backbone(images)
        outputs: dict[str, Tensor] = self.head(features, keys, frames)
        if not self.training:
            return {"out": outputs["out"]}
        outputs["aux"] = self.auxiliary_head(auxiliary, keys, frames)["out"]
        if self.embedding is not None:
            outputs["embedding"] = self.embedding(outputs["features"])
        return outputs

    def backbone_names(self) -> tuple[str, ...]:
        """State-dict names of the backbone's entries, which are all that its file has."""
        return self._names(self.backbone.state_dict(keep_vars=True).values())

    def classifier_names(self) -> tuple[str, ...]:
        """State-dict names of the layers that depend on the number of classes, as heads declare them."""
        classifiers = (head.classifier for head in (self.head, self.auxiliary_head))
        return self._names(x for layer in classifiers for x in layer.state_dict(keep_vars=True).values())

    def _names(self, entries: Iterable[Tensor]) -> tuple[str, ...]:
        wanted = {id(entry) for entry in entries}
        return tuple(name for name, x in self.state_dict(keep_vars=True).items() if id(x) in wanted)
