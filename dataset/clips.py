"""Clips of video: labelled frames that are evenly spaced in one sequence.

A sequence is cut into runs wherever the distance between neighbouring labelled frames is not the sequence's
stride, which is its most frequent distance. Clips never leave a run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from dataset.labels import DataError
from dataset.source import DatasetSpec, Pair


class Clip(NamedTuple):
    """Frames in the order of time, and the index of the one that evaluation scores."""

    frames: tuple[Pair, ...]
    scored: int


@dataclass(frozen=True)
class Run:
    """Evenly spaced labelled frames of a sequence, as indices into the list of samples."""

    sequence: str
    stride: int  # 0 for a sequence of one frame
    indices: tuple[int, ...]


def training_clips(spec: DatasetSpec, pairs: Sequence[Pair], length: int) -> tuple[list[Clip], list[str]]:
    """Every clip of ``length`` evenly spaced frames, in the order of the clips' middle frames in ``pairs``.

    With length 1 these are the samples, one by one.

    Returns:
        The clips, and for each sequence a line that states stride, clips and the frames that are in none.

    Raises:
        DataError: no sequences, a length below 1 or above that of the longest run.
    """
    runs = find_runs(spec, pairs, length)
    starts = [
        (run.indices[start + length // 2], run.indices[start : start + length])
        for run in runs
        for start in range(len(run.indices) - length + 1)
    ]
    clips = [Clip(tuple(pairs[index] for index in indices), length // 2) for _, indices in sorted(starts)]
    return clips, _describe(runs, length)


def evaluation_clips(spec: DatasetSpec, pairs: Sequence[Pair], length: int) -> tuple[list[Clip], list[str]]:
    """One clip for each sample, in their order, which scores that sample's frame.

    The frame is the clip's middle one (index length // 2) where the run goes on far enough on both sides;
    else the clip is moved to stay inside. Clips of runs shorter than ``length`` are the whole run.

    Returns, raises: as ``training_clips``.
    """
    runs = find_runs(spec, pairs, length)
    clips: dict[int, Clip] = {}
    for run in runs:
        size = min(length, len(run.indices))
        for position, index in enumerate(run.indices):
            start = min(max(position - size // 2, 0), len(run.indices) - size)
            frames = tuple(pairs[other] for other in run.indices[start : start + size])
            clips[index] = Clip(frames, position - start)
    return [clips[index] for index in range(len(pairs))], _describe(runs, 1)


def find_runs(spec: DatasetSpec, pairs: Sequence[Pair], length: int) -> list[Run]:
    """All runs of all sequences; ``length`` is checked against the longest."""
    if length < 1:
        raise DataError(f"--clip {length}: a clip has at least 1 frame")
    if length == 1:
        return [Run("", 0, (index,)) for index in range(len(pairs))]
    if spec.frame_of is None:
        raise DataError(f"--clip {length}: {spec.name} has no sequences, so no clips; --clip 1 takes images")
    sequences: dict[str, list[tuple[int, int]]] = {}
    for index, pair in enumerate(pairs):
        frame = spec.frame_of(pair.image)
        if frame is None:
            raise DataError(
                f"{pair.image}: this name tells no sequence and frame number, so no clip holds it"
            )
        sequences.setdefault(frame[0], []).append((frame[1], index))
    runs = [
        run for name, frames in sequences.items() for run in _runs_of_sequence(name, sorted(frames), pairs)
    ]
    longest = max(runs, key=lambda run: len(run.indices))
    if length > len(longest.indices):
        raise DataError(
            f"--clip {length}: the longest run of evenly spaced labelled frames has {len(longest.indices)} "
            f"(sequence {longest.sequence}, stride {longest.stride})"
        )
    return runs


def _runs_of_sequence(name: str, frames: list[tuple[int, int]], pairs: Sequence[Pair]) -> list[Run]:
    """Cuts (frame number, index) in the order of time where their distance is not the stride."""
    distances = [after[0] - before[0] for before, after in pairwise(frames)]
    if 0 in distances:
        twice = pairs[frames[distances.index(0)][1]].image
        raise DataError(f"{twice}: this frame of sequence {name} occurs twice")
    counts = Counter(distances)
    stride = min(counts, key=lambda distance: (-counts[distance], distance), default=0)
    cuts = [position for position, distance in enumerate(distances, start=1) if distance != stride]
    return [
        Run(name, stride, tuple(index for _, index in frames[begin:end]))
        for begin, end in zip([0, *cuts], [*cuts, len(frames)], strict=True)
    ]


def _describe(runs: list[Run], length: int) -> list[str]:
    lines = []
    for name in dict.fromkeys(run.sequence for run in runs if run.sequence):
        parts = [run for run in runs if run.sequence == name]
        frames = sum(len(run.indices) for run in parts)
        clips = sum(max(0, len(run.indices) - length + 1) for run in parts)
        unused = sum(len(run.indices) for run in parts if len(run.indices) < length)
        line = f"sequence {name}: stride {parts[0].stride}, {_count(frames, 'labelled frame')}, "
        line += _count(clips, "clip")
        if len(parts) > 1:
            line += f", which end at {_count(len(parts) - 1, 'hole')}"
        if unused:
            line += f"; {_count(unused, 'frame')} {'is' if unused == 1 else 'are'} in no clip"
        lines.append(line)
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
