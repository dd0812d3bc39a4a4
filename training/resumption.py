"""Checkpoints of a run, and continuing from one as if the run had never been interrupted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dataset import DatasetSpec
from networks.config import FLAT_SETTINGS, NetworkConfig
from training.recipes import Recipe, describe_changes, recipe_from_dict, recipe_to_dict
from training.snapshots import checkpoints, find_checkpoint, newest_or_best
from training.step import TrainStep, complete_momentum
from utils.arguments import UsageError, flag_of
from utils.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    model_state,
    random_state,
    set_random_state,
)
from utils.distributed import Process
from utils.fields import UnknownChoiceError, describe_differences

NEEDED = {"model", "optimizer", "step", "random_states"}


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to continue from, and what it was trained with."""

    path: Path
    checkpoint: dict[str, Any]
    recipe: Recipe
    images: str  # fingerprint


def run_state(
    train_step: TrainStep, step: int, recipe: Recipe, spec: DatasetSpec, images: str
) -> dict[str, Any]:
    """All that a run needs to go on after ``step`` steps, and a prediction to have names and colours.

    To be called in all processes. ``images`` is the fingerprint of the training images.
    """
    process, labels = train_step.process, spec.labels
    return {
        "model": train_step.network.state_dict(),
        "network": recipe.network.to_dict(),
        "recipe": recipe_to_dict(recipe),
        "data": {
            "dataset": spec.name,
            "images": images,
            "names": labels.names,
            "palette": labels.palette,
            "ids": labels.ids,
            "mirror_pairs": labels.mirror_pairs,
        },
        "optimizer": train_step.optimizer.state_dict(),
        "scaler": train_step.scaler.state_dict(),
        "step": step,
        "random_states": process.all_gather_object(random_state(process.device)),
    }


def find_resumed(resume: str | None, directory: Path) -> Resumed | None:
    """The checkpoint that ``--resume`` means; None if there is nothing to continue from.

    Args:
        resume: a checkpoint or a folder of them; "" means the newest in ``directory``; None: do not resume.

    Raises:
        CheckpointError: it cannot be read, or is not one of a run.
    """
    if resume is None:
        return None
    path = find_checkpoint(Path(resume)) if resume else newest_or_best(directory)
    if path is None:
        return None
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        others = [] if resume else [other for other in checkpoints(directory) if other != path]
        hint = f"; if you move it away, --resume goes on from {others[-1].name}" if others else ""
        raise CheckpointError(f"{error}{hint}") from None
    missing = NEEDED - checkpoint.keys()
    if missing:
        raise CheckpointError(f"{path}: cannot be resumed, it lacks {', '.join(sorted(missing))}")
    return Resumed(path, checkpoint, *saved_recipe(path, checkpoint))


def saved_recipe(path: Path, checkpoint: Mapping[str, Any]) -> tuple[Recipe, str]:
    """The recipe that a checkpoint was trained with, and the fingerprint of its images.

    Raises:
        CheckpointError: it has none, or fields that are unknown, of another type or out of bounds.
    """
    try:
        if "settings" in checkpoint:
            return from_settings(checkpoint["settings"])
        network = NetworkConfig.from_dict(checkpoint["network"])
        return recipe_from_dict(checkpoint["recipe"], network), str(checkpoint["data"]["images"])
    except KeyError as error:
        reason = f"it lacks {error.args[0]}"
    except UnknownChoiceError as error:
        reason = f"its settings are not known ({error}; --recipe module:NAME makes a file of yours known)"
    except ValueError as error:
        reason = f"its contents are damaged ({error})"
    except (TypeError, AttributeError):
        reason = "its contents are damaged (its settings are not named values)"
    raise CheckpointError(f"{path}: cannot be resumed, {reason}")


def from_settings(settings: Mapping[str, Any]) -> tuple[Recipe, str]:
    """Recipe and images of a checkpoint from before there were recipes, which holds one flat dict.

    Raises:
        ValueError, TypeError: values of another type or out of bounds.
    """
    network = NetworkConfig.from_dict({name: settings[name] for name in FLAT_SETTINGS if name in settings})
    known = {option.name for option in fields(Recipe)} - {"network"}
    values = {name: value for name, value in settings.items() if name in known}
    return recipe_from_dict(values, network), str(settings.get("images"))


def restore(resumed: Resumed, train_step: TrainStep, recipe: Recipe, images: str) -> int:
    """Restore what ``run_state`` saved; returns the step to go on with.

    Args:
        recipe: of this run, whose optimiser settings hold from now on.
        images: fingerprint of this run's images.

    Raises:
        CheckpointError: it was trained on other data, does not fit the network, or is damaged.
        UsageError: a flag asks for another network than the checkpoint's.
    """
    path, checkpoint, process = resumed.path, resumed.checkpoint, train_step.process
    # ccl decides whether there is an embedding.
    before, now = (x.network.to_dict() | {"ccl": x.ccl} for x in (resumed.recipe, recipe))
    for name in now:
        if name not in ("norm", "recurrence") and before[name] != now[name]:
            raise UsageError(f"{flag_of(name)} {now[name]} contradicts {path}, which has {before[name]}")
    if resumed.images != images:
        raise CheckpointError(f"{path}: was trained on other data ({resumed.images}, not {images})")
    load_weights(train_step.network, model_state(checkpoint), path)
    try:
        step = _whole_number(checkpoint["step"])
        _load_optimizer(train_step.optimizer, checkpoint["optimizer"])
        if checkpoint.get("scaler") and train_step.scaler.is_enabled():
            train_step.scaler.load_state_dict(checkpoint["scaler"])
        states = checkpoint["random_states"]
        if len(states) == process.world_size:
            set_random_state(states[process.rank], process.device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be resumed, its contents are damaged ({reason})") from None
    return step


def resumption_lines(resumed: Resumed, recipe: Recipe, world_size: int) -> list[str]:
    """What a run that was restored says of its checkpoint, and what is not as it was there."""
    lines = [f"resuming {resumed.path} at step {resumed.checkpoint['step']}"]
    changed = describe_changes(resumed.recipe, recipe)
    if changed:
        lines.append(f"not the same run any more, since these settings changed: {', '.join(changed)}")
    processes = len(resumed.checkpoint["random_states"])
    if processes != world_size:
        lines.append(f"processes {processes} → {world_size}: the same numbers up to rounding")
    return lines


def _load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load momentum; rates, momentum and decay of each group stay those of this command line."""
    own = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
        for parameter in group["params"]:
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is None:
                continue
            if momentum.shape != parameter.shape:
                raise ValueError(f"momentum of shape {tuple(momentum.shape)} for {tuple(parameter.shape)}")
            # The fused optimiser takes it to lie in memory as the parameter does.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    complete_momentum(optimizer)


def _whole_number(step: object) -> int:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"step {step!r}")
    return step


def check_same_start(
    process: Process, data: str, step: int, recipe: Recipe, options: Mapping[str, Any]
) -> None:
    """All processes, perhaps started on several machines, must have the same files and settings.

    Args:
        data: fingerprints of the images.
        step: the steps that are done.
        recipe: the run's.
        options: other values that must be equal, by their flags' names.

    Raises:
        CheckpointError: in the main process, where files differ; PeerError in the others.
        UsageError: likewise, where settings differ.
    """
    difference = process.find_difference((f"{data} at step {step}", recipe, dict(options)))
    if difference is None:
        return
    rank, (files, recipe, options), (other_files, other_recipe, other_options) = difference
    if files != other_files:
        raise CheckpointError(
            f"the processes would start from different files: {files}, but process {rank} has "
            f"{other_files}; all machines must see the same --data-dir and --snapshot-dir"
        )
    differ = describe_changes(recipe, other_recipe) + describe_differences(options, other_options)
    raise UsageError(f"process {rank} was started with other settings: {', '.join(differ)}")
