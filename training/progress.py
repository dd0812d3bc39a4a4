"""Progress bar, ``log.jsonl``, TensorBoard events and mean losses of a run."""

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.criterion import Losses
from training.step import TrainingError
from utils.distributed import Process
from utils.files import write_atomically

NOT_FINITE_HINT = "earlier checkpoints are kept, a lower --learning-rate may help"


class LogError(RuntimeError):
    """A log that cannot be read or written: one line that names the file and the reason."""

    exit_status = 1


class Progress:
    """The main process's bar and logs; when a run resumes, lines after its checkpoint are removed.

    Args:
        directory: where ``log.jsonl`` and the events go.
        first_step, num_steps: steps that are done, and that the run has in all.

    Raises:
        LogError: the log of an earlier part of the run cannot be read.
    """

    def __init__(self, directory: Path, first_step: int, num_steps: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = path = directory / "log.jsonl"
        kept = [line for line in _lines(path) if _step_of(line) <= first_step] if first_step else []
        write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        self._events = SummaryWriter(str(directory), purge_step=first_step + 1)
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", mininterval=1)

    def step_done(self) -> None:
        """Advance the bar."""
        self._bar.update()

    def losses(self, step: int, values: dict[str, Any]) -> None:
        """Log what ``LossWindow.read`` returned, and show loss and rate on the bar."""
        self.scalars(step, values)
        self._bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.2e}")

    def scalars(self, step: int, values: dict[str, Any], group: str = "train") -> None:
        """One line of ``log.jsonl`` and one point of each TensorBoard curve ``<group>/<name>``.

        A value may be a dict of values; a None is in the file only, where NaN and infinity are None too.

        Raises:
            LogError: the disk is full, the folder was removed …
        """
        with self._writing():
            finite = {name: _finite(value) for name, value in values.items()}
            line = {"step": step} | finite | {"step": step}  # even if a user's loss has that name too
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for name, value in values.items():
                several = value.items() if isinstance(value, dict) else [(None, value)]
                for part, number in several:
                    if number is not None:
                        path = f"{group}/{name}" if part is None else f"{group}/{name}/{part}"
                        self._events.add_scalar(path, number, step)
            self._events.flush()

    def pictures(self, step: int, pictures: list[np.ndarray]) -> None:
        """Pictures (H,W,3) uint8 RGB of image, label and prediction, in TensorBoard."""
        with self._writing():
            for index, picture in enumerate(pictures):
                name = f"image, label, prediction/{index}"
                self._events.add_image(name, picture, step, dataformats="HWC")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        try:
            with self._writing():
                self._file.close()
                self._events.close()
        except LogError:
            if kind is None:  # otherwise the first error says more
                raise
        finally:
            threading.excepthook = self._excepthook

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(
                f"{self._path.parent}: cannot write log.jsonl and TensorBoard events ({error.strerror}); "
                "checkpoints written so far are kept"
            ) from None

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread: its error is raised in the next call here."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)


class LossWindow:
    """The losses of the steps since they were last read. Reading them waits for the device.

    Args:
        process: the losses are the means over all processes.
        batch_size: images of a step, over all processes.
    """

    def __init__(self, process: Process, batch_size: int) -> None:
        self.process, self.batch_size = process, batch_size
        self._losses: list[Losses] = []
        self._seconds = 0.0
        self._began = time.perf_counter()

    def __len__(self) -> int:
        """How many steps there are since the last read."""
        return len(self._losses)

    def begin(self) -> None:
        """A step begins, the wait for its batch included; what lies between steps is not counted."""
        self._began = time.perf_counter()

    def end(self, losses: Losses) -> None:
        """A step ended."""
        self._losses.append(losses)
        self._seconds += time.perf_counter() - self._began

    def read(self, step: int) -> dict[str, float]:
        """Mean losses since the last call by their names, and "images_per_second"; ``step`` is the last one.

        Raises:
            TrainingError: a loss is infinite or not a number.
        """
        began = time.perf_counter()
        names = list(self._losses[0])
        table = torch.stack([torch.stack([losses[name] for name in names]) for losses in self._losses])
        table = self.process.mean(table).double().cpu()  # (steps, names)
        seconds = self._seconds + time.perf_counter() - began
        count = len(table)
        for index, loss in enumerate(table[:, names.index("loss")].tolist()):
            if not math.isfinite(loss):  # in all processes alike
                fault = f"step {step - count + 1 + index}: the loss is {loss}"
                self.process.raise_if_any_failed(TrainingError(f"{fault}; {NOT_FINITE_HINT}"))
        self._losses, self._seconds = [], 0.0
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        return means | {"images_per_second": count * self.batch_size / seconds}


def _finite(value: Any) -> Any:
    """The value, None in the place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def was_logged(directory: Path, step: int, name: str) -> bool:
    """Whether the log of a folder has a value of that name at that step."""
    lines = [line for line in _lines(directory / "log.jsonl") if _step_of(line) == step]
    return any(name in json.loads(line) for line in lines)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path}: cannot read this log ({error}); move it away to start a new one") from None
    return [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one


def _step_of(line: str) -> float:
    """The step of a line of ``log.jsonl``; infinity for one that has none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
