"""Checkpoints: written whole or not at all, loaded without running anything from the file."""

import importlib
import io
import lzma
import os
import pickle
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

    exit_status = 1


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

    Files of ``torch.save``, also compressed (.xz), and .safetensors, if that package is installed. Scalars of
    numpy become plain numbers.

    Raises:
        CheckpointError: not there, truncated, damaged (its checksums are compared), not a checkpoint, or
            holding objects that would have to be unpickled, which could run any code and is never done.
    """
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        contents = _load_pickled(path)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"{path}: cannot read this checkpoint ({error.strerror})") from None
    except MemoryError:
        raise
    except Exception:  # damaged files make torch raise about anything
        raise CheckpointError(f"{path}: not a readable checkpoint, truncated or of another kind") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(contents).__name__}")
    return contents


def _load_pickled(path: Path) -> Any:
    """A file of torch.save: its checksums, then its contents."""
    source = io.BytesIO(lzma.decompress(path.read_bytes())) if path.suffix == ".xz" else path
    is_zip = zipfile.is_zipfile(source)
    if is_zip:
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path}: damaged, the checksum of {damaged} does not fit; take another copy"
            )
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # about pickles, which are refused anyway
            torch.serialization.safe_globals(NUMPY_SCALARS),
        ):
            if isinstance(source, io.BytesIO):
                source.seek(0)
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            is_pickle = file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        if not is_zip and not (is_pickle and "Unsupported" in str(error)):
            raise
        raise CheckpointError(
            f"{path}: refused, it holds pickled objects other than tensors and plain values"
        ) from None


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError:
        raise CheckpointError(f"{path}: to read .safetensors, pip install safetensors") from None
    if not path.is_file():  # the package has an error of its own for that
        path.open("rb").close()
    return dict(load_file(path))


class _NumpyType:
    """Stands for numpy.dtype while unpickling, so that nothing of numpy is called by a file."""

    def __init__(self, code: str, *_flags: object) -> None:
        if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"Unsupported numpy type {code}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyType, data: bytes) -> bool | int | float:
    """Stands for numpy's own function: a plain number."""
    value: bool | int | float = np.frombuffer(data, kind.dtype, 1)[0].item()
    return value


# numpy 1 and 2 pickle a scalar as scalar(dtype, bytes)
NUMPY_SCALARS: list[Any] = [
    (_NumpyType, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]

# Where training programs put the weights, and what wrappers put before their names.
CONTAINERS = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights", "params")
COUNTER = "num_batches_tracked"  # of BatchNorm, which ABN does without
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "segmenter.")


def model_state(contents: dict[str, Any], source: Path = Path("checkpoint")) -> dict[str, Tensor]:
    """The network's state dict within a checkpoint, without wrappers' prefixes.

    Looks into the usual containers, also where a tensor that counts something lies beside them; prefixes, in
    any nesting, go where all names carry them.

    Args:
        source: the file, for messages.

    Raises:
        CheckpointError: several containers hold weights, or nothing does.
    """
    while not any(isinstance(value, Tensor) and "." in str(name) for name, value in contents.items()):
        found = [name for name in CONTAINERS if _holds_weights(contents.get(name))]
        if not found and any(isinstance(value, Tensor) for value in contents.values()):
            break
        if len(found) > 1:
            raise CheckpointError(
                f"{source}: holds weights in {', '.join(found)}; keep one of them in the file"
            )
        if not found:
            raise CheckpointError(f"{source}: holds no weights of a network")
        contents = contents[found[0]]
    state = {
        name: value for name, value in contents.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    while prefix := next((x for x in WRAPPERS if state and all(name.startswith(x) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _holds_weights(value: object) -> bool:
    """Whether there are tensors under names, here or in a container within."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(x, Tensor) for x in value.values()) or any(
        _holds_weights(value.get(name)) for name in CONTAINERS
    )


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: Path,
    may_lack: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> None:
    """Load a state dict that fits exactly, up to the named prefixes and counters of batches.

    Args:
        source: the file it came from, for messages.
        may_lack: prefixes of entries that may be missing; the model keeps its own.
        skip: prefixes of entries of the file that are left out.

    Raises:
        CheckpointError: entries are missing, unexpected, of another shape or kind (sparse, complex, whole
            numbers), or not finite; the model is unchanged.
    """
    own = model.state_dict()
    state = {
        name: value
        for name, value in state.items()
        if not name.startswith(tuple(skip)) and (name in own or not name.endswith(COUNTER))
    }
    missing = (n for n in own if n not in state and not n.endswith(COUNTER))
    faults = {
        "missing": [n for n in missing if not n.startswith(tuple(may_lack))],
        "unexpected": [n for n in state if n not in own],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
            for n in own
            if n in state and state[n].shape != own[n].shape
        ],
        "of another kind": [
            f"{n} ({str(state[n].layout if state[n].layout != torch.strided else state[n].dtype)[6:]})"
            for n in own
            if n in state and not _is_plain(state[n], own[n])
        ],
    }
    if any(faults.values()):
        parts = [f"{len(names)} {fault}: {_shorten(names)}" for fault, names in faults.items() if names]
        raise CheckpointError(f"{source}: does not fit this network; " + "; ".join(parts))
    if broken := not_finite({n: state[n] for n in own if n in state}):
        raise CheckpointError(f"{source}: {len(broken)} of its weights are not finite: {_shorten(broken)}")
    lost = model.load_state_dict(state, strict=False).unexpected_keys
    if lost:  # two modules claim one name
        raise CheckpointError(f"{source}: {len(lost)} of its weights reach no module: {_shorten(lost)}")


def _is_plain(value: Tensor, own: Tensor) -> bool:
    return value.layout == torch.strided and value.is_floating_point() == own.is_floating_point()


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """The entries that hold NaN or infinity."""
    return [name for name, x in state.items() if not is_finite(x)]


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are; a finite sum, which is much faster to have, says so."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


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
