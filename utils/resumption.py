"""Going on with a run as if it had never been interrupted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    model_state,
    random_state,
    set_random_state,
)
from utils.distributed import PeerError, Process
from utils.training import TrainStep, complete_momentum


def state_of(train_step: TrainStep, step: int, settings: dict[str, Any]) -> dict[str, Any]:
    """All that a run needs to go on after ``step`` steps; to be called in all processes."""
    process = train_step.process
    return {
        "model": train_step.network.state_dict(),
        "optimizer": train_step.optimizer.state_dict(),
        "scaler": train_step.scaler.state_dict(),
        "step": step,
        "random_states": process.gather(random_state(process.device)),
        "settings": settings,
    }


def resume(path: Path, train_step: TrainStep, settings: dict[str, Any], defining: Sequence[str]) -> int:
    """Restore what ``state_of`` returned from a checkpoint; the step to go on with.

    Args:
        settings: of this command line; those of the optimiser hold from now on.
        defining: names of the settings that change a run's numbers; changed ones are told.

    Raises:
        CheckpointError: not such a checkpoint, of another network, or of other data.
    """
    checkpoint, process = load_checkpoint(path), train_step.process
    missing = {"model", "optimizer", "step", "random_states", "settings"} - checkpoint.keys()
    if missing:
        raise CheckpointError(f"{path}: cannot be resumed, it lacks {', '.join(sorted(missing))}")
    load_weights(train_step.network, model_state(checkpoint), path)
    try:
        step, then = int(checkpoint["step"]), dict(checkpoint["settings"])
        states = checkpoint["random_states"]
        train_step.optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint.get("scaler") and train_step.scaler.is_enabled():
            train_step.scaler.load_state_dict(checkpoint["scaler"])
        if len(states) == process.world_size:
            set_random_state(states[process.rank], process.device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be resumed, its contents are damaged ({reason})") from None
    for group in train_step.optimizer.param_groups:  # the rate is set at each step
        group["momentum"], group["weight_decay"] = settings["momentum"], settings["weight_decay"]
    complete_momentum(train_step.optimizer)

    if then.get("images") != settings["images"]:
        raise CheckpointError(
            f"{path}: was trained on other data ({then.get('images')}, not {settings['images']})"
        )
    if process.is_main:
        print(f"resuming {path} at step {step}")
        pairs = [(name, then[name], settings[name]) for name in defining if name in then]
        changed = [f"{name} {before} → {now}" for name, before, now in pairs if before != now]
        if changed:
            print(f"not the same run any more, since these settings changed: {', '.join(changed)}")
        if len(states) != process.world_size:
            print(f"processes {len(states)} → {process.world_size}: the same numbers up to rounding")
    return step


def check_same_start(process: Process, images: str, step: int) -> None:
    """All processes, perhaps on several machines, must see the same data and the same checkpoint.

    Raises:
        CheckpointError: in the main process, if they do not; PeerError in the others.
    """
    starts = process.gather((images, step))
    other = next((rank for rank, start in enumerate(starts) if start != starts[0]), None)
    if other is None:
        return
    if not process.is_main:
        raise PeerError
    (images, step), (other_images, other_step) = starts[0], starts[other]
    raise CheckpointError(
        f"the processes would start from different files: {images} at step {step}, but process {other} has "
        f"{other_images} at step {other_step}; all machines must see the same --data-dir and --snapshot-dir"
    )
