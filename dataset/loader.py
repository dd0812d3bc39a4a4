"""Samples in an order that depends on the seed alone: not on the workers, the processes or a restart.

A training run sees positions 0, 1, 2 … of an endless order: each epoch is a permutation of the data set
drawn from (seed, epoch), and the augmentation and the dropout of a sample are drawn from (seed, position).
The step number determines all of it; there is no state to save.
"""

import copy
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dataset.clips import Clip
from dataset.labels import DataError, LabelTable
from dataset.reading import read_sample
from dataset.source import Pair
from dataset.transforms import AffineTransform, Normalization, TrainTransform


class Batch(NamedTuple):
    """Training samples; an item of a TrainDataset is one without the first axis."""

    images: torch.Tensor  # (B,3,h,w) float32, normalised; clips (B,3,T,h,w)
    labels: torch.Tensor  # (B,h,w) uint8 train ids; clips (B,T,h,w)
    keys: torch.Tensor  # (B,) int64 in 0 .. 2³²-1: the dropout of each sample is drawn from its key


class Sample(NamedTuple):
    """A whole image to evaluate, or a clip of which one frame is scored."""

    image: torch.Tensor  # (3,H,W) float32, normalised; a clip (3,T,H,W)
    label: torch.Tensor | None  # (H,W) uint8 train ids of the image or of the frame that is scored
    name: str  # of that frame; no other sample of the data set has it
    scored: int = 0  # index of that frame in the clip


class TrainDataset(Dataset[Batch]):
    """Augmented crops, indexed by their position in the endless order.

    Args:
        pairs: the samples, images or clips; all have labels.
        labels: how the label files are encoded.
        transform: the augmentation.
        seed: what the order, the augmentation and the keys are drawn from.
    """

    def __init__(
        self,
        pairs: Sequence[Pair | Clip],
        labels: LabelTable,
        transform: TrainTransform | AffineTransform,
        seed: int,
    ) -> None:
        frames = (frame for sample in pairs for frame in _frames(sample))
        without_label = next((frame.image for frame in frames if frame.label is None), None)
        if without_label is not None:
            raise DataError(f"{without_label}: has no label to train on")
        self.pairs, self.labels, self.transform, self.seed = pairs, labels, transform, seed

    def __getitem__(self, position: int) -> Batch:
        """Image (3,h,w) float32, label (h,w) uint8 train ids, key () int64; clips with T after the 3."""
        sample, rng = self.sample(position), np.random.default_rng([self.seed, position, 1])
        with _memory_fault_named(sample):
            frames = _read(_frames(sample), self.labels, self.transform.ignore_label)
            image, label = frames[0]
            if isinstance(sample, Clip):
                image, label = (np.stack(arrays) for arrays in zip(*frames, strict=True))
            assert label is not None
            image, label = self.transform(image, label, rng)
        return Batch(torch.from_numpy(image), torch.from_numpy(label), torch.tensor(self.key(position)))

    def sample(self, position: int) -> Pair | Clip:
        """The sample at a position of the order."""
        epoch, index = divmod(position, len(self.pairs))
        order = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.pairs))
        return self.pairs[order[index]]

    def key(self, position: int) -> int:
        """What the dropout of the sample at this position is drawn from, 0 .. 2³²-1."""
        return int(np.random.default_rng([self.seed, position, 2]).integers(2**32))


class EvaluationDataset(Dataset[Sample]):
    """Whole images or clips, in order.

    Args:
        pairs: the samples, with or without labels.
        labels: how the label files are encoded.
        normalization: applied to the images.
        ignore_label: train id of pixels that are not scored.
    """

    def __init__(
        self,
        pairs: Sequence[Pair | Clip],
        labels: LabelTable,
        normalization: Normalization = Normalization(),  # noqa: B008 (frozen)
        ignore_label: int = 255,
    ) -> None:
        self.pairs, self.labels, self.ignore_label = pairs, labels, ignore_label
        self.normalization = normalization
        # What is written under this name can be anything that takes text, so bytes that are none become \\x….
        scored = [sample.frames[sample.scored] if isinstance(sample, Clip) else sample for sample in pairs]
        stems = [os.fsencode(pair.image.stem).decode("utf-8", "backslashreplace") for pair in scored]
        unique = len(set(stems)) == len(stems)
        self.names = stems if unique else [f"{index:05d}_{stem}" for index, stem in enumerate(stems)]

    def share(self, rank: int, world_size: int) -> "EvaluationDataset":
        """The part that one of several processes evaluates, with the same names."""
        part = copy.copy(self)
        part.pairs, part.names = self.pairs[rank::world_size], self.names[rank::world_size]
        return part

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        sample = self.pairs[index]
        frames, scored = _frames(sample), sample.scored if isinstance(sample, Clip) else 0
        # The other labels of a clip are not needed.
        pairs = [pair if i == scored else pair._replace(label=None) for i, pair in enumerate(frames)]
        with _memory_fault_named(sample):
            contents = _read(pairs, self.labels, self.ignore_label)
            images = [torch.from_numpy(self.normalization(image)) for image, _ in contents]
            label = contents[scored][1]
            return Sample(
                torch.stack(images, dim=1) if isinstance(sample, Clip) else images[0],
                None if label is None else torch.from_numpy(label),
                self.names[index],
                scored,
            )


def _frames(sample: Pair | Clip) -> tuple[Pair, ...]:
    return sample.frames if isinstance(sample, Clip) else (sample,)


def _read(
    frames: Sequence[Pair], labels: LabelTable, ignore_label: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Image (H,W,3) and label (H,W) or None of each frame; all are of one size."""
    contents = [read_sample(frame, labels, ignore_label) for frame in frames]
    (first_height, first_width, _) = contents[0][0].shape
    for frame, (image, _) in zip(frames, contents, strict=True):
        height, width, _ = image.shape
        if (height, width) != (first_height, first_width):
            raise DataError(
                f"{frame.image} is {width}x{height} but the first frame of its clip, "
                f"{frames[0].image}, is {first_width}x{first_height}"
            )
    return contents


@contextmanager
def _memory_fault_named(sample: Pair | Clip) -> Iterator[None]:
    try:
        yield
    except (MemoryError, cv2.error) as error:
        if isinstance(error, cv2.error) and error.code != cv2.Error.StsNoMem:
            raise
        raise DataError(
            f"{_frames(sample)[0].image}: not enough memory to scale and crop this image; "
            "cut it into smaller ones"
        ) from None


@dataclass(frozen=True)
class StepSampler:
    """The positions of each step's batch, for one of several processes.

    Args:
        batch_size: samples of a step over all processes; a multiple of ``world_size * accumulate``.
        first_step, last_step: the steps to be done are first_step .. last_step - 1.
        rank, world_size: this process takes the rank-th share of every batch.
        accumulate: a batch is cut into so many parts, one after another, and each part is shared.
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


def load_batches(
    dataset: TrainDataset, sampler: StepSampler, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """One batch for each step of the sampler.

    Args:
        num_workers: processes that read; 0 reads in this one.
        pin_memory: for a GPU, to which pinned memory is copied in the background.

    Raises:
        DataError: a fault of the data, also when a worker process met it; a worker died; or memory, shared
            memory or file handles are used up.
    """
    return _load(dataset, num_workers, pin_memory, batch_sampler=sampler)


def load_samples(
    dataset: EvaluationDataset, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Sample]:
    """The samples one by one, in order; arguments and errors as in ``load_batches``."""
    return _load(dataset, num_workers, pin_memory, collate=_to_shared_memory)


# What PyTorch says when workers fail → what to do, in the order in which it is looked for.
DIED = "a worker process that reads the data died"
REMEDIES = {
    "Too many open files|items of ancdata": "too many open files: raise the limit (ulimit -n 4096), "
    "or --num-workers 0",
    "shared memory|No space left on device|Bus error": "shared memory is full: --num-workers 0, or a larger "
    "/dev/shm (docker run --shm-size 8g)",
    "an't allocate memory|annot allocate memory": "not enough memory for the batches: fewer --num-workers, "
    "or smaller crops",
    r"DataLoader worker \(pid|Pin memory thread exited": DIED,
}


def _load(
    dataset: Dataset[Any],
    num_workers: int,
    pin_memory: bool,
    batch_sampler: StepSampler | None = None,
    collate: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    loader = DataLoader(
        dataset,
        batch_size=1 if batch_sampler is not None else None,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A generator of its own: starting workers draws a number, which must not come from the run's.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_prepare_worker,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
        if num_workers:
            # PyTorch would raise a worker's death wherever the main process is, in the midst of a step or of
            # writing a checkpoint. Waiting for the next batch notices it as well.
            signal.signal(signal.SIGCHLD, handler)
        yield from batches
    except DataError as error:
        # From a worker the message arrives at the end of its traceback.
        raise DataError(str(error).split("dataset.labels.DataError: ")[-1].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        message = str(error) or "end of file"
        remedy = next((told for pattern, told in REMEDIES.items() if re.search(pattern, message)), None)
        # While a worker hands over a batch, its end breaks the connection before its death is noticed.
        if remedy is None and isinstance(error, ConnectionError | EOFError):
            remedy = DIED
        if remedy is None:
            raise
        raise DataError(remedy if remedy != DIED else f"{DIED} ({message.splitlines()[0]})") from None


def _to_shared_memory(sample: Sample) -> Sample:
    """Moves a sample that a worker has read to shared memory.

    PyTorch would do so in a thread, whose errors reach nobody: the run would wait for ever.
    """
    if get_worker_info() is not None:
        for field in sample:
            if isinstance(field, torch.Tensor):
                field.share_memory_()
    return sample


def _prepare_worker(_: int) -> None:
    """Signals sent to all processes of a run are answered by the main one, as are a worker's errors.

    A worker ignores Ctrl-C and a closed terminal. SIGTERM ends it, as when the main process ends, but not as
    a failure, which would be raised in the midst of whatever the main process does. Neither the threads that
    hand over batches nor inherited objects print tracebacks. A worker that would lose a batch ends instead.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None
    Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore[attr-defined]
