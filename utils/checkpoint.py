"""Checkpoints: written whole or not at all, loaded without running anything from the file."""

import os
import random
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written: one line that names the file and the reason."""


def save_checkpoint(contents: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, read it back, then give it its name.

    So whatever has a checkpoint's name is whole, and nothing is left of one that failed.

    Raises:
        CheckpointError: no room, no permission …; what was at ``path`` before is untouched.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        reason = _fault_of(temporary, contents.get("step"))
        if not reason:
            temporary.replace(path)
    except OSError as error:
        reason = error.strerror
    except RuntimeError:  # torch's word for a failed write
        reason = "write failed, is the disk full?"
    finally:
        temporary.unlink(missing_ok=True)
    if reason:
        raise CheckpointError(f"{path}: cannot save the checkpoint ({reason}); earlier ones are kept")


def _fault_of(path: Path, step: object) -> str | None:
    """What is wrong with a checkpoint just written."""
    try:
        return None if load_checkpoint(path).get("step") == step else "what was written is of another step"
    except CheckpointError:
        return "what was written cannot be read back"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Whatever dict a file holds, on the CPU: one of ours, a plain state dict, or one wrapped by others.

    Raises:
        CheckpointError: not there, truncated, not a checkpoint, or holding objects that would have to be
            unpickled, which could run any code and is never done.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles, which are refused anyway
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"{path}: cannot read this checkpoint ({error.strerror})") from None
    except Exception as error:
        with path.open("rb") as file:
            is_pickle = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        if is_pickle and "Unsupported" in str(error):
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
        if isinstance(name, str) and isinstance(value, Tensor) and not name.endswith("num_batches_tracked")
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


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all random generators that this process uses, as plain values and tensors."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``random_state`` returned, for a device of the same type."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _shorten(names: list[str], shown: int = 3) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
