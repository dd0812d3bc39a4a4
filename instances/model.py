"""torchvision's Mask R-CNN with an attention layer before the last block of its third stage (res4)."""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cc_attention import CrissCrossAttention
from instances.errors import UsageError, require
from networks.heads.non_local import NonLocalAttention
from utils.checkpoint import CheckpointError, load_checkpoint, not_finite

BACKBONES = {"resnet18": 256, "resnet50": 1024, "resnet101": 1024}  # channels of the third stage
ATTENTIONS = ("criss_cross", "nonlocal", "none")
NORMS = ("frozen", "batch")
ATTENTION_PREFIX = "backbone.body.layer3.attention."
PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


@dataclass(frozen=True)
class MaskRCNNConfig:
    """All that decides a network.

    Attributes:
        num_classes: categories plus one for the background; labels are COCO's category ids, hence 91.
        backbone: a key of ``BACKBONES``, with a feature pyramid.
        attention: the layer before the last block of the third stage.
        recurrence: rounds R of that layer, whose weights the rounds share; 0 with attention "none".
        norm: "frozen" (statistics and weights as loaded, for pretrained backbones) or "batch" (BatchNorm2d).
        norm_eps: added to the variance; torchvision's released COCO detectors were trained with 0.
        trainable_layers: stages of the backbone that are trained, from the last on: 0 … 5.
        min_size, max_size: images are scaled to this short side in pixels, but no longer than max_size.
        anchor_size: side in pixels of the smallest anchors; the five pyramid levels double it.
        roi_samples: boxes an image that the box head is trained on.
        proposals: proposals a pyramid level and image kept in training; half as many in evaluation.

    Raises:
        ValueError: a field is out of its range.
    """

    num_classes: int = 91
    backbone: str = "resnet50"
    attention: str = "criss_cross"
    recurrence: int = 2
    norm: str = "frozen"
    norm_eps: float = 1e-5
    trainable_layers: int = 3
    min_size: int = 800
    max_size: int = 1333
    anchor_size: int = 32
    roi_samples: int = 512
    proposals: int = 2000

    def __post_init__(self) -> None:
        for name, choices in (("backbone", BACKBONES), ("attention", ATTENTIONS), ("norm", NORMS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        least_values = {"num_classes": 2, "recurrence": 0, "norm_eps": 0, "trainable_layers": 0}
        least_values |= {"min_size": 32, "anchor_size": 1, "roi_samples": 1, "proposals": 2}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.trainable_layers > 5:
            raise ValueError(f"trainable_layers must be at most 5; got {self.trainable_layers}")
        if self.max_size < self.min_size:
            raise ValueError(f"max_size must be at least min_size {self.min_size}; got {self.max_size}")
        if (self.attention == "none") != (self.recurrence == 0):
            raise ValueError(
                f"recurrence 0 and attention none go together; got {self.recurrence} and {self.attention}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


class Recurrent(nn.Module):
    """R rounds of the attention that a subclass also inherits; the identity as long as gamma is 0."""

    def __init__(self, in_channels: int, recurrence: int) -> None:
        super().__init__(in_channels)
        self.recurrence = recurrence

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) → (B,C,H,W)."""
        out = x
        for _ in range(self.recurrence):
            out = super().forward(out)
        return out


class RecurrentCrissCross(Recurrent, CrissCrossAttention):
    """Each position attends to its row and column."""


class RecurrentNonLocal(Recurrent, NonLocalAttention):
    """Each position attends to all H·W, by the same projections, so that the two can be compared."""


def insert_attention(stage: nn.Sequential, attention: nn.Module) -> nn.Sequential:
    """The same blocks under the same names, and ``attention`` before the last of them."""
    *first, (last_name, last) = stage.named_children()
    return nn.Sequential(OrderedDict([*first, ("attention", attention), (last_name, last)]))


def build_model(config: MaskRCNNConfig, score_threshold: float = 0.05) -> Any:
    """torchvision's ``MaskRCNN`` with random weights.

    Args:
        score_threshold: detections below it are not returned in evaluation.

    Returns:
        As torchvision's: a list of images (3,H,W) float32 RGB in 0..1, in training with targets, gives a dict
        of losses in training and in evaluation a list of dicts "boxes" (N,4), "labels" (N), "scores" (N),
        "masks" (N,1,H,W).
    """
    detection = require("torchvision.models.detection")
    ops = require("torchvision.ops")
    norms = {"frozen": ops.misc.FrozenBatchNorm2d, "batch": nn.BatchNorm2d}
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name=config.backbone,
        weights=None,
        norm_layer=partial(norms[config.norm], eps=config.norm_eps),
        trainable_layers=config.trainable_layers,
    )
    if config.attention != "none":
        make = {"criss_cross": RecurrentCrissCross, "nonlocal": RecurrentNonLocal}[config.attention]
        attention = make(BACKBONES[config.backbone], config.recurrence)
        backbone.body["layer3"] = insert_attention(backbone.body["layer3"], attention)
    sizes = tuple((config.anchor_size * 2**level,) for level in range(5))
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return detection.MaskRCNN(
        backbone,
        config.num_classes,
        min_size=config.min_size,
        max_size=config.max_size,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=config.proposals,
        rpn_post_nms_top_n_train=config.proposals,
        rpn_pre_nms_top_n_test=config.proposals // 2,
        rpn_post_nms_top_n_test=config.proposals // 2,
        box_batch_size_per_image=config.roi_samples,
        box_score_thresh=score_threshold,
    )


def norm_eps_of(path: Path | None) -> float:
    """The epsilon that the normalisation of a file's weights was trained with; None: of random weights."""
    if path is None:
        return 1e-5
    contents = load_checkpoint(path)
    if isinstance(contents.get("config"), dict):
        return contents["config"].get("norm_eps", 1e-5)
    # torchvision's released detectors had none: bare state dicts, with names older than its present ones.
    return 0.0 if "rpn.head.conv.weight" in contents else 1e-5


def start_from(model: Any, path: Path, new_predictors: bool = False) -> str:
    """Load weights to start from; what they lack of the attention layer keeps its initial values.

    Args:
        path: an ImageNet ResNet in torchvision's names, a Mask R-CNN of torchvision or one of our own.
        new_predictors: leave out the layers whose size is the number of classes.

    Returns:
        What was loaded, in words.

    Raises:
        CheckpointError: not readable, or of another architecture.
    """
    contents = load_checkpoint(path)
    state = contents["model"] if isinstance(contents.get("model"), dict) else contents
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "backbone.body.conv1.weight" in state:
        if new_predictors:
            state = {name: value for name, value in state.items() if not name.startswith(PREDICTORS)}
        may_lack = (ATTENTION_PREFIX, *(PREDICTORS if new_predictors else ()))
        _load(model, state, path, may_lack)
        return f"the detector {path}"
    if "conv1.weight" in state and "layer4.0.conv1.weight" in state:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        _load(model.backbone.body, state, path, (ATTENTION_PREFIX.removeprefix("backbone.body."),))
        return f"the ImageNet backbone {path}"
    raise CheckpointError(
        f"{path}: holds neither a ResNet in torchvision's names nor a Mask R-CNN of torchvision or ours"
    )


def load_model(path: Path, score_threshold: float = 0.05, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A trained network in evaluation mode and the checkpoint it is from.

    Args:
        changes: fields of ``MaskRCNNConfig`` that no weights depend on, such as ``min_size``.

    Raises:
        CheckpointError: not a checkpoint of ``instances.train``.
        UsageError: a change is out of its range.
    """
    contents = load_checkpoint(path)
    try:
        config = MaskRCNNConfig(**(contents["config"] | changes))
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: is not a checkpoint of instances.train") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    model = build_model(config, score_threshold)
    _load(model, contents["model"], path, ())
    return model.eval(), contents


def _load(model: nn.Module, state: dict[str, Tensor], path: Path, may_lack: tuple[str, ...]) -> None:
    """Load a state dict that fits strictly, up to the prefixes in ``may_lack`` and batch counters."""
    if broken := not_finite(state):
        raise CheckpointError(f"{path}: {len(broken)} of its weights are not finite, such as {broken[0]}")
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch lists the entries of another shape, one a line
        first = str(error).strip().splitlines()[1].strip() if "\n" in str(error) else str(error)
        hint = "; --not-restore-last leaves these layers out" if "predictor" in first else ""
        raise CheckpointError(
            f"{path}: weights of another architecture ({first.rstrip('.')}){hint}"
        ) from None
    faults = {
        "missing": [n for n in missing if not n.startswith(may_lack)],
        "unexpected": list(unexpected),
    }
    parts = [
        f"{len(names)} {fault}, such as {names[0]}"
        for fault, found in faults.items()
        if (names := [n for n in found if not n.endswith("num_batches_tracked")])
    ]
    if parts:
        raise CheckpointError(f"{path}: weights of another architecture ({'; '.join(parts)})")
