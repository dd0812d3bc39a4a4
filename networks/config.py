"""Everything that decides a network, in one place: flags, checkpoints and build_model go by it."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any, Self

from networks.heads import HEADS
from networks.layers import NORMS
from networks.resnet import BACKBONES, STEMS
from utils.fields import check_fields, from_dict, setting, to_dict

# The network's fields among the flat settings of checkpoints from before there was a NetworkConfig.
FLAT_SETTINGS = ("model", "num_classes", "backbone", "recurrence", "norm")

# Fields that change what weights compute, but neither their names nor their shapes. R does too, but is often
# changed on purpose.
NOT_IN_SHAPES = ("contracted_dilation", "mean", "std", "channel_order", "head_activation", "align_corners")


@dataclass(frozen=True)
class NetworkConfig:
    """A network's settings; the defaults are the published network.

    Raises (on construction):
        ValueError: an unknown name, a number out of bounds, an option that the head does not take.
    """

    model: str = setting("ccnet", "the network, by its head", choices=HEADS)
    num_classes: int = setting(19, "classes, the channels of the logits", min=1, max=255)
    backbone: str = setting("resnet101", "the network's feature extractor", choices=BACKBONES)
    stem: str = setting(
        "deep",
        "the backbone's first layers; deep: three 3x3 convolutions, plain: one 7x7, as torchvision has it, "
        "v1c: the narrower three of mmsegmentation",
        choices=STEMS,
    )
    contracted_dilation: bool = setting(
        False, "the first block of a dilated stage has half the dilation, as in mmsegmentation"
    )
    recurrence: int = setting(2, "rounds R of criss-cross attention", min=0, head_option=True)
    initial_gamma: float = setting(
        0.0,
        "start of gamma, the factor that attention is added with; 0: published code, 1: the paper's equation",
        head_option=True,
    )
    explicit_attention: bool = setting(
        False, "store the attention map of model nonlocal: more memory, as published", head_option=True
    )
    norm: str = setting(
        "auto",
        "normalisation; auto: inplace_abn, on several GPUs its synchronised form, sync",
        choices=lambda: ("auto", *NORMS),
    )
    mean: tuple[float, float, float] = setting(
        (104.00698793, 116.66876762, 122.67891434),
        "mean that is taken off the input's channels, in their order, in units of 0..255",
    )
    std: tuple[float, float, float] = setting(
        (1.0, 1.0, 1.0), "what the input's channels are then divided by", exclusive_min=0
    )
    channel_order: str = setting("BGR", "order of the input's channels", choices=("BGR", "RGB"))
    head_activation: str = setting(
        "leaky_relu", "activation after the normalisation in the heads", choices=("leaky_relu", "relu")
    )
    auxiliary_channels: int = setting(
        0, "width of the auxiliary head; 0: half of the channels that it sees", min=0
    )
    align_corners: bool = setting(True, "how logits are enlarged, whether corners stay corners")

    def __post_init__(self) -> None:
        check_fields(self)
        for field in _options_of_others(self.model):
            value = getattr(self, field.name)
            if value != field.default:
                takers = [name for name, head in HEADS.items() if field.name in head.options]
                raise ValueError(
                    f"{field.name}={value!r} is an option of {', '.join(takers)}; model {self.model} has none"
                )

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """The same with other values; where the head changes, options that only the old one has are dropped.

        Raises:
            ValueError: as on construction.
        """
        dropped = {}
        if changes.get("model", self.model) != self.model and changes["model"] in HEADS:
            dropped = {field.name: field.default for field in _options_of_others(changes["model"])}
        return replace(self, **{**dropped, **changes})

    @property
    def needs_two_images(self) -> bool:
        """As of the head: whether training needs two images or more for each normalisation."""
        return bool(HEADS[self.model].needs_two_images)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, as a checkpoint holds them."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What ``to_dict`` returned; missing fields have their default, unknown ones are errors."""
        return from_dict(cls, values)


def _options_of_others(model: str) -> list["Field[Any]"]:
    """The fields that only other heads take."""
    options = HEADS[model].options
    return [x for x in fields(NetworkConfig) if x.metadata.get("head_option") and x.name not in options]


# The network that the reference's code has; classes and R are arguments there.
REFERENCE_NETWORK = {
    name: getattr(NetworkConfig(), name)
    for name in ("model", "backbone", "stem", "auxiliary_channels", *NOT_IN_SHAPES)
}


def difference(config: NetworkConfig, network: Mapping[str, Any]) -> str:
    """In what a config differs from another code's network, in words; empty: in nothing."""
    return "; ".join(
        f"{name} is {getattr(config, name)}, there {value}"
        for name, value in network.items()
        if getattr(config, name) != value
    )
