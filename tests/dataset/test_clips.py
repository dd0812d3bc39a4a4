"""Clips of video: evenly spaced, never over a hole, each frame scored once."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import (
    DATASETS,
    Clip,
    DataError,
    EvaluationDataset,
    Pair,
    StepSampler,
    TrainDataset,
    TrainTransform,
    evaluation_clips,
    find_dataset,
    list_samples,
    load_batches,
    load_samples,
    training_clips,
)
from dataset.camvid import frame_of

CAMVID = DATASETS["camvid"]


def pairs_of(*frames):
    return [Pair(Path(f"train/{name}_{number:05d}.png"), Path("label")) for name, number in frames]


def numbers(clips):
    return [tuple(frame_of(pair.image)[1] for pair in clip.frames) for clip in clips]


# A sequence of stride 30 with a hole, one of stride 2 between its parts, and a single frame.
FRAMES = [
    *(("A", n) for n in (30, 60, 90, 120)),
    *(("A", n) for n in (900, 930, 960)),
    *(("B", n) for n in (902, 904, 906)),
    ("C", 7),
    ("A", 990),  # the list is not in the order of time
]


def test_training_clips_are_evenly_spaced_and_end_at_holes():
    clips, notes = training_clips(CAMVID, pairs_of(*FRAMES), 3)
    assert numbers(clips) == [
        (30, 60, 90), (60, 90, 120), (900, 930, 960), (930, 960, 990), (902, 904, 906),
    ]  # fmt: skip
    assert notes == [
        "sequence train/A: stride 30, 8 labelled frames, 4 clips, which end at 1 hole",
        "sequence train/B: stride 2, 3 labelled frames, 1 clip",
        "sequence train/C: stride 0, 1 labelled frame, 0 clips; 1 frame is in no clip",
    ]


@pytest.mark.parametrize("length", [2, 3, 4])
def test_each_frame_is_scored_once_in_the_middle_where_there_is_one(length):
    pairs = pairs_of(*FRAMES)
    clips, notes = evaluation_clips(CAMVID, pairs, length)
    assert [clip.frames[clip.scored] for clip in clips] == pairs
    runs = {30: [30, 60, 90, 120], 900: [900, 930, 960, 990], 902: [902, 904, 906], 7: [7]}
    for (_, number), clip, frames in zip(FRAMES, clips, numbers(clips), strict=True):
        run = next(run for run in runs.values() if number in run)
        position = run.index(number)
        assert len(frames) == min(length, len(run))
        assert set(frames) <= set(run)
        assert len({after - before for before, after in pairwise(frames)}) <= 1
        first = position - length // 2
        if first >= 0 and first + length <= len(run):
            assert clip.scored == length // 2
    assert notes[0].startswith("sequence train/A: stride 30, 8 labelled frames")


def test_strides_are_those_of_each_split():
    """Validation frames of the same sequence, two frames apart, lie in a hole of the training frames."""
    train = [Pair(Path(f"train/S_{n:05d}.png"), None) for n in (0, 30, 60, 300, 330)]
    val = [Pair(Path(f"val/S_f{n:05d}.png"), None) for n in (100, 102, 104, 106)]
    clips, notes = training_clips(CAMVID, train + val, 2)
    assert numbers(clips) == [(0, 30), (30, 60), (300, 330), (100, 102), (102, 104), (104, 106)]
    assert [line.split(",")[0] for line in notes] == [
        "sequence train/S: stride 30",
        "sequence val/S: stride 2",
    ]


def test_runs_end_where_the_spacing_is_another_also_without_a_hole():
    """As in CamVid, where one labelled frame lies 31 frames after the one before and 29 before the next."""
    pairs = pairs_of(*(("A", n) for n in (0, 30, 60, 90, 121, 150, 180, 195, 225)))
    clips, notes = training_clips(CAMVID, pairs, 2)
    assert numbers(clips) == [(0, 30), (30, 60), (60, 90), (150, 180), (195, 225)]
    assert notes == [
        "sequence train/A: stride 30, 9 labelled frames, 5 clips, which end at 3 holes; 1 frame is in no clip"
    ]
    scored, _ = evaluation_clips(CAMVID, pairs, 2)
    assert numbers(scored)[3:6] == [(60, 90), (121,), (150, 180)]


def test_of_two_spacings_as_frequent_the_smaller_is_the_stride():
    pairs = pairs_of(*(("A", n) for n in (0, 2, 3, 5, 6)))
    assert numbers(training_clips(CAMVID, pairs, 2)[0]) == [(2, 3), (5, 6)]


def test_one_frame_equals_the_image_path(demo_data):
    """Same order, same keys, same augmentation, same pixels, with an axis of length 1."""
    spec = find_dataset(demo_data)
    pairs = list_samples(spec, demo_data, "train")
    clips, notes = training_clips(spec, pairs, 1)
    assert clips == evaluation_clips(spec, pairs, 1)[0] == [Clip((pair,), 0) for pair in pairs]
    assert notes == []
    transform = TrainTransform((33, 41))
    datasets = [TrainDataset(samples, spec.labels, transform, seed=5) for samples in (pairs, clips)]
    for image, clip in zip(*(load_batches(d, StepSampler(3, 0, 3)) for d in datasets), strict=True):
        assert torch.equal(image.images, clip.images.squeeze(2))
        assert torch.equal(image.labels, clip.labels.squeeze(1))
        assert torch.equal(image.keys, clip.keys)
    samples = [load_samples(EvaluationDataset(list_, spec.labels)) for list_ in (pairs, clips)]
    for image, clip in zip(*samples, strict=True):
        assert torch.equal(image.image[:, None], clip.image)
        assert torch.equal(image.label, clip.label)
        assert (image.name, image.scored) == (clip.name, clip.scored)


@pytest.fixture
def video(tmp_path):
    """CamVid's layout: frame n is a picture of the value n."""
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    for number in range(5):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(tmp_path / f"train/S_{number:03d}.png")
        Image.new("L", (30, 20), number).save(tmp_path / f"trainannot/S_{number:03d}.png")
    spec = find_dataset(tmp_path)
    return spec, list_samples(spec, tmp_path, "train")


def test_clips_become_batches_and_samples(video):
    spec, pairs = video
    clips, _ = training_clips(spec, pairs, 3)
    batch = next(
        load_batches(TrainDataset(clips, spec.labels, TrainTransform((16, 17)), 0), StepSampler(2, 0, 1), 1)
    )
    assert batch.images.shape == (2, 3, 3, 16, 17)
    assert batch.labels.shape == (2, 3, 16, 17)
    assert batch.keys.shape == (2,)
    first = batch.labels[:, 0, 0, 0]
    assert torch.equal(batch.labels[:, :, 0, 0], torch.stack([first, first + 1, first + 2], dim=1))
    clips, _ = evaluation_clips(spec, pairs, 3)
    samples = list(load_samples(EvaluationDataset(clips, spec.labels), 1))
    assert [sample.scored for sample in samples] == [0, 1, 1, 1, 2]
    for number, sample in enumerate(samples):
        assert sample.image.shape == (3, 3, 20, 30)
        assert sample.name == f"S_{number:03d}"
        assert (sample.label == number).all()
        assert sample.label.shape == (20, 30)
        red = sample.image[2, :, 0, 0].numpy() + np.float32(122.67891434)
        assert np.rint(red).tolist() == [number - sample.scored + k for k in range(3)]


def test_clips_without_labels(video):
    spec, pairs = video
    unlabelled = [pair._replace(label=None) for pair in pairs]
    clips, _ = evaluation_clips(spec, unlabelled, 3)
    assert EvaluationDataset(clips, spec.labels)[0].label is None
    clips, _ = training_clips(spec, [*pairs[:3], *unlabelled[3:]], 3)
    with pytest.raises(DataError, match=r"S_003\.png: has no label to train on"):
        TrainDataset(clips, spec.labels, TrainTransform((16, 17)), 0)


def test_frames_of_different_size(video):
    spec, pairs = video
    Image.new("RGB", (31, 20)).save(pairs[1].image)
    Image.new("L", (31, 20)).save(pairs[1].label)
    message = r"S_001\.png is 31x20 but the first frame of its clip, .*S_000\.png, is 30x20"
    clips, _ = training_clips(spec, pairs[:3], 3)
    with pytest.raises(DataError, match=message):
        TrainDataset(clips, spec.labels, TrainTransform((16, 17)), 0)[0]
    clips, _ = evaluation_clips(spec, pairs[:3], 3)
    with pytest.raises(DataError, match=message):
        EvaluationDataset(clips, spec.labels)[0]


@pytest.mark.parametrize("make", [training_clips, evaluation_clips])
@pytest.mark.parametrize(
    ("spec", "frames", "length", "message"),
    [
        (CAMVID, FRAMES, 0, r"^--clip 0: a clip has at least 1 frame"),
        (CAMVID, FRAMES, 5, r"^--clip 5: the longest run .* has 4 \(sequence train/A, stride 30\)"),
        (DATASETS["cityscapes"], FRAMES, 2, "^--clip 2: cityscapes has no sequences"),
        (
            CAMVID,
            [("A", 1), ("A", 2), ("A", 2)],
            2,
            "A_00002.png: this frame .* twice",
        ),
        (replace(CAMVID, frame_of=lambda _: None), FRAMES, 2, r"A_00030\.png: this name tells no sequence"),
    ],
)
def test_bad_clips(make, spec, frames, length, message):
    with pytest.raises(DataError, match=message):
        make(spec, pairs_of(*frames), length)


def test_camvid_clips(camvid):
    for split, strides in (("train", {30}), ("val", {2}), ("test", {30})):
        pairs = list_samples(CAMVID, camvid, split)
        clips, notes = training_clips(CAMVID, pairs, 5)
        found = {after - before for frames in numbers(clips) for before, after in pairwise(frames)}
        assert found == strides
        assert all(len({pair.image.name.split("_")[0] for pair in clip.frames}) == 1 for clip in clips)
        scored, _ = evaluation_clips(CAMVID, pairs, 5)
        assert [clip.frames[clip.scored] for clip in scored] == pairs
        assert len(notes) == len({pair.image.name.split("_")[0] for pair in pairs})
