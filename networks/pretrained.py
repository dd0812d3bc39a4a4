"""Weights from files: a whole network for evaluation, or the start of a training run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from networks.config import NOT_IN_SHAPES, NetworkConfig
from networks.mmsegmentation import (
    MMSEGMENTATION_NETWORK,
    config_of_mmsegmentation,
    from_mmsegmentation,
    is_mmsegmentation,
)
from networks.names import from_batch_norm, from_torchvision
from networks.recognition import config_of, stem_by_shape, told_by
from networks.registry import build_model
from networks.resnet import STEMS
from networks.segmenter import Segmenter
from utils.checkpoint import COUNTER, CheckpointError, load_checkpoint, load_weights, model_state
from utils.fields import UnknownChoiceError

EMBEDDING = ("embedding.",)  # in training only
IMAGENET_CLASSIFIER = ("fc.",)


def load_model(path: Path | str, **settings: Any) -> tuple[Segmenter, NetworkConfig]:
    """A network in evaluation mode from one of our checkpoints or a plain state dict, and its config.

    Args:
        path: the file.
        settings: fields of NetworkConfig, in the place of the file's.

    Raises:
        CheckpointError: the file cannot be read, describes no network, or its weights do not fit.
    """
    path = Path(path)
    return restore_model(load_checkpoint(path), path, **settings)


def restore_model(contents: dict[str, Any], path: Path, **settings: Any) -> tuple[Segmenter, NetworkConfig]:
    """``load_model`` of a file that was read already; ``path`` is for messages."""
    state = model_state(contents, path)
    try:
        config = config_of(contents, state, **settings)
        model = build_model(config)
    except (TypeError, ValueError) as error:
        is_unknown = isinstance(error, UnknownChoiceError)
        hint = "; a file of yours that adds it is named by --recipe module:NAME" if is_unknown else ""
        raise CheckpointError(f"{path}: its settings make no network ({error}){hint}") from None
    state = to_our_names(state, model)
    if "conv1.weight" in state and not any(name.startswith("head.") for name in state):
        raise CheckpointError(f"{path}: is a backbone without a head; train a network that starts from it")
    _check_stem(state, model, path)
    auxiliary = () if any(name.startswith("dsn.") for name in state) else ("dsn.",)
    with _name_likely_cause(contents, model):
        load_weights(model, state, path, may_lack=auxiliary, skip=EMBEDDING)
    return model.eval(), config


def to_our_names(state: dict[str, Tensor], model: Segmenter) -> dict[str, Tensor]:
    """A state dict as the model has it: of mmsegmentation's names, or with BatchNorm in the place of ABN.

    BatchNorm is known by its counters of batches; where the model has one too, it stays as it is.
    """
    if is_mmsegmentation(state):
        return from_mmsegmentation(state)
    counters = {name for name in state if name.endswith(COUNTER)} - model.state_dict().keys()
    return from_batch_norm(state, {name.removesuffix(COUNTER) for name in counters})


def _check_stem(state: dict[str, Tensor], model: Segmenter, path: Path) -> None:
    stem, own = state.get("conv1.weight"), getattr(model.backbone, "stem", None)
    if stem is None or stem.dim() != 4 or own not in STEMS:
        return
    words = {
        "deep": "the deep stem (three 3x3 convolutions)",
        "plain": "the plain stem (one 7x7 convolution)",
        "v1c": "the narrow stem (three 3x3 convolutions, 32 channels)",
    }
    needed = stem_by_shape(stem)
    if needed and needed != own:
        raise CheckpointError(
            f"{path}: is for {words[needed]}, the network has the {own} one; --stem {needed}"
        )


@contextmanager
def _name_likely_cause(contents: dict[str, Any], model: Segmenter) -> Iterator[None]:
    """An error of weights that do not fit says so where the file is of another backbone or model."""
    try:
        yield
    except CheckpointError as error:
        told, own = {}, model.config
        with suppress(ValueError):  # of settings that are none
            told = told_by(contents, model_state(contents, Path()))
        causes = [
            f"; its {name} is {told[name]}, the network's {getattr(own, name)}: --{name} {told[name]}"
            for name in ("backbone", "model")
            if own is not None and name in told and told[name] != getattr(own, name)
        ]
        raise CheckpointError(f"{error}{''.join(causes)}") from None


def _require_mmsegmentation_network(model: Segmenter, path: Path) -> None:
    """Refuse weights that mean something else in this network, though they may have its shapes."""
    if model.config is None:
        return
    different = {
        name: value for name, value in MMSEGMENTATION_NETWORK.items() if getattr(model.config, name) != value
    }
    if different:
        flags = [
            f"--{name.replace('_', '-')} {','.join(map(str, x)) if isinstance(x, tuple) else x}"
            for name, x in different.items()
        ]
        raise CheckpointError(f"{path}: is mmsegmentation's CCNet, another network; {' '.join(flags)}")


def settings_from_start(contents: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of NetworkConfig that a run takes over from the file it starts from.

    With other values its weights would mean something else, though they may fit. mmsegmentation's CCNet has
    many, our checkpoints store those of ``NOT_IN_SHAPES``, and other files have none.

    Args:
        contents: the file's, as ``load_checkpoint`` reads it.
        path: the file, for messages.

    Raises:
        CheckpointError: it holds no weights, those of a network that is not known, or impossible settings.
    """
    state = model_state(contents, path)
    if not is_mmsegmentation(state):
        stored = contents.get("network")
        if not isinstance(stored, dict) or any(isinstance(x, Tensor) for x in stored.values()):
            return {}  # other programs have their weights there
        values = {name: stored[name] for name in NOT_IN_SHAPES if name in stored}
        try:
            config = NetworkConfig.from_dict(values)
        except ValueError as error:
            raise CheckpointError(f"{path}: its settings make no network ({error})") from None
        return {name: getattr(config, name) for name in values}
    try:
        values = config_of_mmsegmentation(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {name: value for name, value in values.items() if name != "num_classes"}  # the data decide


@dataclass(frozen=True)
class Start:
    """The file whose weights a new run begins with."""

    path: Path
    contents: dict[str, Any]
    network: dict[str, Any]  # fields of NetworkConfig that are taken from it, see ``settings_from_start``


def read_start(path: Path) -> Start:
    """Read the file to start from; raises as ``load_checkpoint`` and ``settings_from_start``."""
    contents = load_checkpoint(path)
    return Start(path, contents, settings_from_start(contents, path))


def start_from(model: Segmenter, contents: dict[str, Any], path: Path, new_classifiers: bool = False) -> str:
    """Begin a run with the weights of a whole network, ours or mmsegmentation's, or of an ImageNet backbone.

    A backbone's file has no heads: MIT scene parsing's for the deep stem, torchvision's for the plain one.
    MIT's is from before BatchNorm counted batches: its weights are taken for ABN's, as in the reference.

    Args:
        model: the network, whose weights are overwritten.
        contents: the file's, as ``load_checkpoint`` reads it.
        path: the file, for messages.
        new_classifiers: leave the network's classifiers as they are (--not-restore-last).

    Returns:
        What of the network is new: "heads", "classifiers", or nothing.

    Raises:
        CheckpointError: it does not fit; the model is unchanged.
    """
    state = model_state(contents, path)
    if is_mmsegmentation(state):
        _require_mmsegmentation_network(model, path)
    has_heads = is_mmsegmentation(state) or any(name.startswith(("head.", "dsn.")) for name in state)
    _check_stem(state, model, path)
    if has_heads or getattr(model.backbone, "stem", None) != "plain":
        state = to_our_names(state, model)
    else:
        state = from_torchvision(state, model.backbone)
    own, backbone, classifiers = model.state_dict(), model.backbone_names(), model.classifier_names()
    heads = tuple(name for name in own if name not in backbone)
    may_lack, skip = (EMBEDDING, ()) if has_heads else (heads, IMAGENET_CLASSIFIER)
    if model.embedding is None:
        skip = (*skip, *EMBEDDING)
    if new_classifiers:
        may_lack, skip = (*may_lack, *classifiers), (*skip, *classifiers)
    try:
        with _name_likely_cause(contents, model):
            load_weights(model, state, path, may_lack, skip)
    except CheckpointError as error:
        other = [name for name in state if name in own and state[name].shape != own[name].shape]
        if new_classifiers or not other or not all(name in classifiers for name in other):
            raise
        raise CheckpointError(f"{error}; --not-restore-last leaves the classifiers out") from None
    if has_heads:
        return "classifiers" if new_classifiers else ""
    return "heads"
