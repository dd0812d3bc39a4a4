"""What a run leaves to be looked at: TensorBoard events and ``log.jsonl``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class Logger:
    """Writes both; on resuming, what was logged after the checkpoint is taken back.

    Args:
        directory: where the files go.
        step: the step that the run starts at.
    """

    def __init__(self, directory: Path, step: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = path = directory / "log.jsonl"
        kept = [line for line in _lines(path) if _step_of(line) <= step] if step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(directory), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, Any], group: str = "train") -> None:
        """One line of ``log.jsonl`` and one point of each TensorBoard curve ``<group>/<name>``.

        A value may be a dict of values; a None is in the file only.
        """
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        for name, value in values.items():
            several = value.items() if isinstance(value, dict) else [(None, value)]
            for part, number in several:
                if number is not None:
                    path = f"{group}/{name}" if part is None else f"{group}/{name}/{part}"
                    self._events.add_scalar(path, number, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H,W,3) uint8 RGB in TensorBoard."""
        self._events.add_image(name, picture, step, dataformats="HWC")

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()


def was_logged(directory: Path, step: int, name: str) -> bool:
    """Whether the log of a folder has a value of that name at that step."""
    lines = [line for line in _lines(directory / "log.jsonl") if _step_of(line) == step]
    return any(name in json.loads(line) for line in lines)


def duration(seconds: float) -> str:
    """In the two largest of its units."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """Pictures (H,W,3) uint8 of one height, with a white gap of 1/64 of the height between them."""
    gap = np.full((pictures[0].shape[0], max(pictures[0].shape[0] // 64, 2), 3), 255, np.uint8)
    row = [part for picture in pictures for part in (gap, picture)][1:]
    return np.concatenate(row, axis=1)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []


def _step_of(line: str) -> float:
    """The step of a line of ``log.jsonl``; infinity for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
