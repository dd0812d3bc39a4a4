"""The rest of the paper by its commands: other heads, category consistent loss, ADE20K, LIP, clips."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset.reading import read_image
from evaluation import Predictor
from networks import HEADS
from tests.scripts.conftest import THIN, log_of, same_tensors
from utils.checkpoint import load_checkpoint

ONE_STEP = ("--batch-size", 2, "--num-steps", 1)
QUIET = ("--gpu", "cpu", "--num-workers", 0)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def blobs(seed, values, size=(40, 56)):
    """A picture and a label of a few rectangles with the given values."""
    rng = np.random.default_rng(seed)
    label = np.full(size, values[0], np.uint8)
    for value in values[1:]:
        top, left = rng.integers(0, size[0] - 12), rng.integers(0, size[1] - 12)
        label[top : top + 12, left : left + 12] = value
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8), label


@pytest.mark.parametrize("model", sorted(set(HEADS) - {"ccnet"}))
def test_each_head_trains_resumes_and_is_evaluated(call, demo_data, tmp_path, model):
    options = ("--data-dir", demo_data, *THIN, "--batch-size", 2, "--snapshot-dir", tmp_path, "--ohem", 0)
    result = call("train.py", *options, "--model", model, "--num-steps", 1)
    assert result.status == 0, result.error
    assert f"network   {model} on thin, 19 classes" in result.out
    result = call("train.py", *options, "--resume", "--num-steps", 2)
    assert result.status == 0, result.error
    assert load_checkpoint(tmp_path / "CS_scenes_2.pth")["network"]["model"] == model
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", tmp_path, "--output-dir", tmp_path, *QUIET
    )
    assert result.status == 0, result.error
    assert "mIoU " in result.out


def test_an_option_of_another_head_is_refused(call, demo_data, tmp_path):
    options = ("--data-dir", demo_data, *THIN, *ONE_STEP, "--snapshot-dir", tmp_path)
    result = call("train.py", *options, "--model", "fcn", "--recurrence", 3)
    assert result.status == 2
    assert "recurrence=3 is an option of ccnet" in result.error
    assert result.error.count("\n") == 1


def test_the_category_consistent_loss(call, demo_data, tmp_path):
    """Logged in its terms; its embedding is for training only, and may come or go between runs."""
    options = ("--data-dir", demo_data, *THIN, *ONE_STEP, "--ohem", 0, "--learning-rate", 1e-30)
    result = call("train.py", *options, "--snapshot-dir", tmp_path / "with", "--ccl")
    assert result.status == 0, result.error
    (line,) = log_of(tmp_path / "with")
    terms = line["loss_ccl_var"] + line["loss_ccl_dis"] + 0.001 * line["loss_ccl_reg"]
    assert line["loss"] == pytest.approx(line["loss_head"] + 0.4 * line["loss_aux"] + terms, rel=1e-5)
    assert line["loss_ccl_dis"] > 0
    checkpoint = tmp_path / "with" / "CS_scenes_1.pth"
    embedding = {name for name in load_checkpoint(checkpoint)["model"] if name.startswith("embedding.")}
    assert embedding == {"embedding.weight", "embedding.bias"}
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", checkpoint, "--output-dir", tmp_path, *QUIET
    )
    assert result.status == 0, result.error
    result = call("train.py", *options, "--snapshot-dir", tmp_path / "without", "--restore-from", checkpoint)
    assert result.status == 0, result.error
    without = load_checkpoint(tmp_path / "without" / "CS_scenes_1.pth")["model"]
    assert not any(name.startswith("embedding.") for name in without)
    result = call(
        "train.py", *options, "--snapshot-dir", tmp_path / "again", "--ccl", "--ccl-kind", "quadratic",
        "--restore-from", tmp_path / "without",
    )  # fmt: skip
    assert result.status == 0, result.error
    assert "embedding.weight" in load_checkpoint(tmp_path / "again" / "CS_scenes_1.pth")["model"]


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for index in range(3):
            picture, label = blobs(index, (0, 1, 150, 42))
            write(root / "images" / split / f"{index}.jpg", picture)
            write(root / "annotations" / split / f"{index}.png", label)
    return root


def test_ade20k(call, ade20k, tmp_path):
    small = ("--backbone", "thin", "--input-size", "33,41", "--short-sides", "30,50", *ONE_STEP, *QUIET)
    result = call(
        "train.py", "--recipe", "ade20k", "--data-dir", ade20k, "--snapshot-dir", tmp_path / "run", *small
    )
    assert result.status == 0, result.error
    assert load_checkpoint(tmp_path / "run" / "ADE20K_1.pth")["network"]["num_classes"] == 150
    result = call(
        "evaluate.py", "--data-dir", ade20k, "--restore-from", tmp_path / "run", "--whole",
        "--short-sides", "30,50", "--flip", "--save", "--output-dir", tmp_path / "out", *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert "mean of it and mIoU" in result.out
    ids = np.asarray(Image.open(tmp_path / "out" / "ids" / "0.png"))
    assert ids.shape == (40, 56)
    assert ids.min() >= 1


def test_images_are_evaluated_at_the_short_side_of_the_recipe(call, ade20k, tmp_path, monkeypatch):
    """By validation, evaluate.py and predict.py, unless a flag says otherwise."""
    run, small = tmp_path / "run", ("--backbone", "thin", "--input-size", "33,41", *ONE_STEP, *QUIET)
    result = call(
        "train.py", "--recipe", "ade20k", "--data-dir", ade20k, "--snapshot-dir", run, *small,
        "--short-sides", "30,50", "--eval-short-side", 24, "--val-every", 1,
    )  # fmt: skip
    assert result.status == 0, result.error
    metrics = {}
    for number, flags in enumerate(((), ("--short-sides", 24), ("--fit", "none"), ("--fit", "24,999"))):
        output = tmp_path / str(number)
        result = call(
            "evaluate.py",
            "--data-dir",
            ade20k,
            "--restore-from",
            run,
            "--output-dir",
            output,
            "--save",
            *QUIET,
            *flags,
        )
        assert result.status == 0, result.error
        assert ("images are scaled to a short side of 24" in result.out) == (flags == ())
        metrics[flags] = json.loads((output / "metrics.json").read_text())
    fits = [found["settings"]["fit"] for found in metrics.values()]
    assert fits == [24, None, None, [24, 999]]
    as_the_recipe, by_short_side, own_size, fitted = (found["confusion_matrix"] for found in metrics.values())
    assert as_the_recipe == by_short_side == fitted != own_size
    assert log_of(run)[-1]["mIoU"] == metrics[()]["mIoU"]
    ids = np.asarray(Image.open(tmp_path / "0" / "ids" / "0.png"))
    predictor = Predictor(run / "ADE20K_1.pth", "cpu", whole=False)
    picture = ade20k / "images" / "validation" / "0.jpg"
    predicted = predictor.labels.decode(predictor(read_image(picture)))
    assert (predicted == ids).mean() > 0.999
    output = tmp_path / "predicted"
    sizes = []

    def spy(self, inputs, frame=None):
        sizes.append(tuple(inputs.shape[-2:]))
        return view(self, inputs, frame)

    view = Predictor._view
    monkeypatch.setattr(Predictor, "_view", spy)
    for fit in ((), ("--fit", "none"), ("--fit", "20,99")):
        options = ("--restore-from", run, "--input", picture, "--output-dir", output, "--gpu", "cpu")
        assert call("predict.py", *options, "--whole", "yes", *fit).status == 0
    height, width = read_image(picture).shape[:2]
    assert sizes == [(24, round(width * 24 / height)), (height, width), (20, round(width * 20 / height))]


def test_a_label_beyond_ade20ks_classes_is_named(call, ade20k, tmp_path):
    write(ade20k / "annotations" / "training" / "1.png", np.full((40, 56), 151, np.uint8))
    result = call(
        "train.py", "--recipe", "ade20k", "--data-dir", ade20k, "--snapshot-dir", tmp_path / "run",
        "--backbone", "thin", "--input-size", "33,41", *ONE_STEP, *QUIET,
    )  # fmt: skip
    assert result.status == 1
    assert "annotations/training/1.png: holds label value 151" in result.error
    assert result.error.count("\n") == 1


@pytest.fixture
def lip(tmp_path):
    root = tmp_path / "LIP"
    for split in ("train", "val"):
        names = []
        for index in range(2):
            picture, label = blobs(index, (0, 14, 15, 19))
            write(root / f"{split}_images" / f"{index}.jpg", picture)
            write(root / f"{split}_segmentations" / f"{index}.png", label)
            names.append(f"{index}\n")
        (root / f"{split}_id.txt").write_text("".join(names))
    return root


def test_lip(call, lip, tmp_path):
    """Images are fitted into the crop, in validation, evaluation and prediction too."""
    small = ("--backbone", "thin", "--input-size", "33,41", *ONE_STEP, *QUIET)
    result = call(
        "train.py", "--recipe", "lip", "--data-dir", lip, "--snapshot-dir", tmp_path / "run", *small,
        "--val-every", 1,
    )  # fmt: skip
    assert result.status == 0, result.error
    checkpoint = load_checkpoint(next((tmp_path / "run").glob("*_1.pth")))
    assert checkpoint["data"]["mirror_pairs"] == ((14, 15), (16, 17), (18, 19))
    result = call(
        "evaluate.py", "--data-dir", lip, "--restore-from", tmp_path / "run", "--save",
        "--output-dir", tmp_path / "out", *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert "pixel accuracy" in result.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["settings"]["fit"] == [33, 41]
    assert log_of(tmp_path / "run")[-1]["mIoU"] == pytest.approx(metrics["mIoU"])
    predictor = Predictor(next((tmp_path / "run").glob("*_1.pth")), "cpu", whole=False)
    image = read_image(lip / "val_images" / "0.jpg")
    ids = np.asarray(Image.open(tmp_path / "out" / "ids" / "0.png"))
    assert (predictor(image) == ids).mean() > 0.999


@pytest.fixture
def video(tmp_path):
    """CamVid's layout: a sequence of five frames in train, three in val."""
    root = tmp_path / "camvid"
    for split, count in (("train", 5), ("val", 3)):
        for index in range(count):
            picture, label = blobs(index, (0, 3, 8))
            write(root / split / f"0001TP_{30 * index:06d}.png", picture)
            write(root / f"{split}annot" / f"0001TP_{30 * index:06d}.png", label)
    return root


def test_clips_start_from_images_and_are_evaluated(call, video, tmp_path):
    options = ("--data-dir", video, *THIN, *ONE_STEP, "--ohem", 0)
    result = call("train.py", *options, "--snapshot-dir", tmp_path / "image")
    assert result.status == 0, result.error
    result = call(
        "train.py", *options, "--snapshot-dir", tmp_path / "clip", "--clip", 3, "--recurrence", 3,
        "--restore-from", tmp_path / "image", "--val-every", 1,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert "every 30 frames" in result.out or "stride 30" in result.out, result.out
    assert load_checkpoint(tmp_path / "clip" / "CamVid_1.pth")["recipe"]["clip"] == 3
    scores = []
    for clip in ((), ("--clip", 1)):
        result = call(
            "evaluate.py", "--data-dir", video, "--restore-from", tmp_path / "clip", "--whole", "--flip",
            "--save", "--output-dir", tmp_path / "out", *QUIET, *clip,
        )  # fmt: skip
        assert result.status == 0, result.error
        assert "over 3 images" in result.out
        scores.append(
            np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / "out" / "ids").iterdir())])
        )
    assert scores[0].shape == scores[1].shape == (3, 40, 56)


def test_clips_of_one_frame_are_images(call, video, tmp_path):
    options = ("--data-dir", video, *THIN, "--batch-size", 2, "--num-steps", 2, "--ohem", 0)
    for name, more in (("image", ()), ("clip", ("--clip", 1))):
        assert call("train.py", *options, "--snapshot-dir", tmp_path / name, *more).status == 0
    left, right = (load_checkpoint(tmp_path / name / "CamVid_2.pth")["model"] for name in ("image", "clip"))
    assert same_tensors(left, right)


@pytest.mark.parametrize(
    ("clip", "message", "status"),
    [(6, "the longest", 1), (0, "expected a whole number at least 1, got '0'", 2)],
)
def test_clips_that_cannot_be(call, video, tmp_path, clip, message, status):
    result = call(
        "train.py", "--data-dir", video, *THIN, *ONE_STEP, "--snapshot-dir", tmp_path, "--clip", clip
    )
    assert result.status == status
    assert message in result.error
    assert result.error.count("\n") == 1


def test_data_without_sequences_has_no_clips(call, demo_data, tmp_path):
    result = call(
        "train.py", "--data-dir", demo_data, *THIN, *ONE_STEP, "--snapshot-dir", tmp_path, "--clip", 3
    )
    assert result.status == 1
    assert "no sequences" in result.error or "has no" in result.error
    assert result.error.count("\n") == 1
