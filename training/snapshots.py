"""The checkpoints of a run: a folder of ``<prefix>_<step>.pth`` and ``<prefix>_best.pth``."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

# Open folders that are locked. A data worker must not inherit them: the lock would outlive a killed run.
_held: set[int] = set()


def _close_held() -> None:
    for folder in _held:
        os.close(folder)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


class Snapshots:
    """Saves a run's checkpoints, and removes old ones.

    Args:
        directory: where they are.
        prefix: what their names begin with.
        keep_last: how many there are at most, besides the best; 0 keeps all.
    """

    def __init__(self, directory: Path, prefix: str, keep_last: int = 0) -> None:
        self.directory, self.prefix, self.keep_last = directory, prefix, keep_last
        self.best_path = directory / f"{prefix}_best.pth"

    def save(self, contents: dict[str, Any], step: int) -> Path:
        """Write the checkpoint of a step.

        Raises:
            CheckpointError: it cannot be written; all that was there is still there.
        """
        path = self.directory / f"{self.prefix}_{step}.pth"
        save_checkpoint(contents, path)
        return path

    def prune(self) -> None:
        """Remove those that ``keep_last`` does not keep; once training has gone on from the newest."""
        if self.keep_last:
            for old in checkpoints(self.directory, self.prefix)[: -self.keep_last]:
                old.unlink()

    def save_best(self, contents: dict[str, Any]) -> None:
        """Write the best checkpoint in place of the one before; ``contents["validation"]`` says how good."""
        save_checkpoint(contents, self.best_path)

    def best_miou(self, images: str, fit: object = None) -> float:
        """The mIoU of the best checkpoint, -1 if there is none.

        Args:
            images: fingerprint of those that this run validates on.
            fit: how it scales them.

        Raises:
            CheckpointError: it is damaged, or was scored otherwise, so that nobody can tell which is better.
        """
        if not self.best_path.is_file():
            return -1.0
        try:
            validation = load_checkpoint(self.best_path).get("validation")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; once it is moved away, the run goes on without it") from None
        if not isinstance(validation, dict) or not isinstance(validation.get("mIoU"), float):
            raise CheckpointError(f"{self.best_path}: holds no score of a validation; move it away")
        if "images" not in validation:
            raise CheckpointError(
                f"{self.best_path}: does not say on which images it was scored; move it away"
            )
        then, now = (validation["images"], validation.get("fit", fit)), (images, fit)
        if then != now:
            before, after = (
                f"on {x} ({f'scaled to {size}' if size else 'not scaled'})" for x, size in (then, now)
            )
            raise CheckpointError(
                f"{self.best_path}: was scored {before}, now it would be {after}: they cannot be compared; "
                "validate as then, or move the file away"
            )
        return float(validation["mIoU"])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other run can do the same in this folder.

        Raises:
            CheckpointError: another one is in it.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot hold checkpoints ({error.strerror})") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise CheckpointError(f"{self.directory}: another run is writing there") from None
        except OSError:
            pass  # a file system without locks
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)
            os.close(folder)

    def prepare(
        self, first_step: int, resuming: bool, checkpoint_bytes: int, to_come: int, best: bool = False
    ) -> None:
        """Find out before training whether the checkpoints of a run from ``first_step`` have a place here.

        Args:
            first_step: steps that are done.
            resuming: whether the run goes on; otherwise nothing of another may be here.
            checkpoint_bytes: about the size of one.
            to_come: how many will be written, besides the best.
            best: whether the best will be written.

        Raises:
            CheckpointError: another run's checkpoints are here, or the folder has no room.
        """
        newest = newest_checkpoint(self.directory)
        earlier = newest or (self.best_path if self.best_path.exists() else None)
        if earlier and not resuming:
            raise CheckpointError(
                f"{self.directory} holds {earlier.name} of an earlier run; "
                "continue it with --resume or choose another --snapshot-dir"
            )
        if newest and step_of(newest) > first_step:
            raise CheckpointError(
                f"{self.directory} holds {newest.name}, which is later than step {first_step}; "
                "resume that one, move it away, or choose another --snapshot-dir"
            )
        for left_over in self.directory.glob(f"{self.prefix}_*.tmp"):  # by a kill
            left_over.unlink()
        if self.keep_last:  # a new one is written before an old one goes
            present = len(checkpoints(self.directory, self.prefix))
            to_come = min(to_come, max(self.keep_last + 1 - present, 1))
        check_room(self.directory, checkpoint_bytes, to_come + best)


def checkpoints(directory: Path, prefix: str = "") -> list[Path]:
    """The checkpoints ``<prefix>_<step>.pth`` of a folder, by step; of any prefix if none is given."""
    named = re.compile((re.escape(prefix) or ".*") + r"_\d+\.pth")
    return sorted((path for path in directory.glob("*.pth") if named.fullmatch(path.name)), key=step_of)


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step in a folder."""
    return next(reversed(checkpoints(directory)), None)


def newest_or_best(directory: Path) -> Path | None:
    """The checkpoint of the highest step in a folder; its best, if no other has been written yet."""
    return newest_checkpoint(directory) or next(directory.glob("*_best.pth"), None)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rsplit("_", 1)[1])


def find_checkpoint(path: Path) -> Path:
    """The file itself, or what ``newest_or_best`` finds in a folder.

    Raises:
        CheckpointError: the folder has none.
    """
    if not path.is_dir():
        return path
    newest = newest_or_best(path)
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint <name>_<step>.pth in this folder")
    return newest


def checkpoint_size(network: nn.Module) -> int:
    """About how many bytes a checkpoint takes: weights and statistics, momentum, and a tenth for the rest."""
    entries = [*network.state_dict().values(), *network.parameters()]
    return int(1.1 * sum(x.numel() * x.element_size() for x in entries)) + 2**16


def check_room(directory: Path, checkpoint_bytes: int, count: int) -> None:
    """Make the folder and see that it is writable and has room for ``count`` checkpoints to come.

    Raises:
        CheckpointError: before hours of training are spent on something that cannot be saved.
    """
    if count == 0:
        return
    probe = directory / ".room.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            _allocate(file.fileno(), checkpoint_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot write a checkpoint of {_megabytes(checkpoint_bytes)} ({error.strerror})"
        ) from None
    finally:
        with suppress(OSError):
            probe.unlink()
    free = shutil.disk_usage(directory).free
    if free < count * checkpoint_bytes:
        to_come = "1 checkpoint" if count == 1 else f"{count} checkpoints"
        raise CheckpointError(
            f"{directory}: {_megabytes(free)} free, to come: {to_come} of "
            f"{_megabytes(checkpoint_bytes)}; make room or see --save-pred-every and --keep-last"
        )


def _allocate(file: int, size: int) -> None:
    """Claim room for a file, so that quotas and limits on the file size count as well."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.truncate(file, size)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
