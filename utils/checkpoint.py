"""Checkpoints: written whole or not at all, loaded without running anything from the file."""

import os
import random
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written: one line that names the file and the reason."""


def save_checkpoint(contents: dict[str, Any], directory: Path, prefix: str, step: int) -> Path:
    """Write ``<prefix>_<step>.pth``: to a temporary file first, so that a failure leaves nothing half-done.

    Raises:
        CheckpointError: no room, no permission …; files that were there before are untouched.
    """
    path = directory / f"{prefix}_{step}.pth"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "write failed, is the disk full?"
        raise CheckpointError(
            f"{path}: cannot save the checkpoint ({reason}); earlier ones are kept"
        ) from None
    return path


def newest_checkpoint(directory: Path, prefix: str = "") -> Path | None:
    """The checkpoint of the highest step in a folder."""
    steps = {}
    for path in directory.glob(f"{prefix}*.pth"):
        match = re.fullmatch(r"(.*)_(\d+)\.pth", path.name)
        if match and prefix in ("", match[1]):
            steps[int(match[2])] = path
    return steps[max(steps)] if steps else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Whatever dict a file holds, on the CPU: one of ours, a plain state dict, or one wrapped by others.

    Raises:
        CheckpointError: not there, truncated, not a checkpoint, or holding objects that would have to be
            unpickled, which could run any code and is never done.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise CheckpointError(
                f"{path}: refused, it holds pickled objects other than tensors and plain values"
            ) from None
        reason = "" if zipfile.is_zipfile(path) else ", truncated or of another kind"
        raise CheckpointError(f"{path}: not a readable checkpoint{reason}") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(contents).__name__}")
    return contents


def model_state(contents: dict[str, Any]) -> dict[str, Tensor]:
    """The network's state dict within a checkpoint, without ``module.`` prefixes and batch counters."""
    for key in ("model", "state_dict"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    return {
        name.removeprefix("module."): value
        for name, value in contents.items()
        if isinstance(value, Tensor) and not name.endswith("num_batches_tracked")
    }


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: Path,
    may_lack: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> None:
    """Load a state dict that fits exactly, up to the named prefixes.

    Args:
        source: the file it came from, for messages.
        may_lack: prefixes of entries that may be missing; the model keeps its own.
        skip: prefixes of entries of the file that are left out.

    Raises:
        CheckpointError: entries are missing, unexpected or of another shape; the model is unchanged.
    """
    state = {name: value for name, value in state.items() if not name.startswith(tuple(skip))}
    own = model.state_dict()
    faults = {
        "missing": [n for n in own if n not in state and not n.startswith(tuple(may_lack))],
        "unexpected": [n for n in state if n not in own],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
            for n in own
            if n in state and state[n].shape != own[n].shape
        ],
    }
    if any(faults.values()):
        parts = [f"{len(names)} {fault}: {_shorten(names)}" for fault, names in faults.items() if names]
        raise CheckpointError(f"{source}: does not fit this network; " + "; ".join(parts))
    model.load_state_dict(state, strict=False)


def check_room(directory: Path, checkpoint_bytes: int, count: int) -> None:
    """Make the folder and see that it is writable and has room for the checkpoints to come.

    Raises:
        CheckpointError: before hours of training are spent on something that cannot be saved.
    """
    probe = directory / ".room.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            # Really claims one checkpoint's room: quotas and limits on the file size count as well.
            os.posix_fallocate(file.fileno(), 0, checkpoint_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot write a checkpoint of {_megabytes(checkpoint_bytes)} ({error.strerror})"
        ) from None
    finally:
        if probe.parent.is_dir():
            probe.unlink(missing_ok=True)
    free = shutil.disk_usage(directory).free
    if free < count * checkpoint_bytes:
        raise CheckpointError(
            f"{directory}: {_megabytes(free)} free, but {count} checkpoints of "
            f"{_megabytes(checkpoint_bytes)} are to come; make room or raise --save-pred-every"
        )


def random_state() -> dict[str, Any]:
    """The states of all random generators of this process, as plain values and tensors."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _shorten(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
