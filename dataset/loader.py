"""Samples in an order that depends on the seed alone: not on the workers, the processes or a restart.

A training run sees positions 0, 1, 2 … of an endless order: each epoch is a permutation of the data set
drawn from (seed, epoch), and the augmentation and the dropout of a sample are drawn from (seed, position).
Whoever knows the step knows everything; there is no state to save.
"""

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.files import Pair, read_sample
from dataset.labels import DataError, LabelTable
from dataset.transforms import TrainTransform, normalize


class TrainDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augmented crops, indexed by their position in the endless order.

    Args:
        pairs: the samples; all have a label.
        table: how the labels are encoded.
        transform: the augmentation.
        seed: what the order and the augmentation are drawn from.
    """

    def __init__(self, pairs: list[Pair], table: LabelTable, transform: TrainTransform, seed: int) -> None:
        without_label = next((pair.image for pair in pairs if pair.label is None), None)
        if without_label is not None:
            raise DataError(f"{without_label}: has no label to train on")
        self.pairs, self.table, self.transform, self.seed = pairs, table, transform, seed

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image (3,h,w) float32 and label (h,w) uint8 train ids."""
        image, label = read_sample(self.pair(position), self.table, self.transform.ignore_label)
        assert label is not None
        image, label = self.transform(image, label, np.random.default_rng([self.seed, position, 1]))
        return torch.from_numpy(image), torch.from_numpy(label)

    def pair(self, position: int) -> Pair:
        """The sample at a position of the order."""
        epoch, index = divmod(position, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.pairs))
        return self.pairs[order[index]]

    def keys(self, positions: list[int]) -> torch.Tensor:
        """What the dropout of the samples at these positions is drawn from: (B,) int64 in 0 … 2³²-1."""
        draws = [np.random.default_rng([self.seed, position, 2]).integers(2**32) for position in positions]
        return torch.tensor(draws, dtype=torch.int64)


class EvaluationDataset(Dataset[tuple[torch.Tensor, torch.Tensor | None, str]]):
    """Whole images, in order."""

    def __init__(self, pairs: list[Pair], table: LabelTable, ignore_label: int = 255) -> None:
        self.pairs, self.table, self.ignore_label = pairs, table, ignore_label
        stems = [pair.image.stem for pair in pairs]
        unique = len(set(stems)) == len(stems)
        self.names = stems if unique else [f"{index:05d}_{stem}" for index, stem in enumerate(stems)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None, str]:
        """Image (3,H,W) float32, label (H,W) uint8 train ids or None, and a name that no other image has."""
        image, label = read_sample(self.pairs[index], self.table, self.ignore_label)
        return (
            torch.from_numpy(normalize(image)),
            None if label is None else torch.from_numpy(label),
            self.names[index],
        )


@dataclass(frozen=True)
class StepSampler:
    """The positions of each step's batch, for one of several processes.

    Args:
        batch_size: samples of a step over all processes; a multiple of ``world_size * accumulate``.
        first_step, last_step: the steps to be done are first_step … last_step - 1.
        rank, world_size: this process takes the rank-th share of every batch.
        accumulate: batches are cut into so many parts, one after another, and each part is shared.
    """

    batch_size: int
    first_step: int
    last_step: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def positions(self, step: int) -> list[int]:
        """This process's share of a step."""
        parts = np.arange(self.batch_size).reshape(self.accumulate, self.world_size, -1)
        return (step * self.batch_size + parts[:, self.rank].flatten()).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.positions, range(self.first_step, self.last_step))

    def __len__(self) -> int:
        return self.last_step - self.first_step


DEATH = re.compile(r"DataLoader worker \(pid|Pin memory thread exited")  # in PyTorch's words


def load(
    dataset: Dataset[Any], num_workers: int, sampler: StepSampler | None = None, pin_memory: bool = False
) -> Iterator[Any]:
    """Batches of a TrainDataset as the sampler orders them, or the single samples of an EvaluationDataset.

    Args:
        num_workers: processes that read; 0 reads in this one.
        pin_memory: for a GPU, to which pinned memory is copied in the background.

    Raises:
        DataError: as the data set does, also when a worker process met the fault; or a worker died.
    """
    loader = DataLoader(
        dataset,
        batch_size=1 if sampler is not None else None,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A generator of its own: starting workers draws a number, and the run's generator must not notice.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_the_run,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
        if num_workers:
            # PyTorch would raise a worker's death wherever the main process is, in the midst of a step or of
            # writing a checkpoint. Whoever waits for the next batch notices it as well.
            signal.signal(signal.SIGCHLD, handler)
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        # While a worker hands over a batch, its end breaks the connection before its death is noticed.
        if isinstance(error, RuntimeError) and not DEATH.search(str(error)):
            raise
        reason = (str(error) or "end of file").splitlines()[0]
        raise DataError(f"a worker process that reads the data died ({reason})") from None
    except DataError as error:
        # From a worker the message arrives wrapped in its traceback, ours being the last line.
        raise DataError(
            str(error).strip().splitlines()[-1].removeprefix("dataset.labels.DataError: ")
        ) from None


def _leave_signals_to_the_run(_: int) -> None:
    """A signal to all processes of a run is the main one's to answer.

    Ctrl-C passes a worker by. SIGTERM ends it, as when the main process ends, but not as a failure, which
    would be raised in the midst of whatever the main process does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
