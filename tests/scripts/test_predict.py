"""Predictions of pictures, folders and videos from the command line."""

import os
import shutil
import signal
import threading
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LabelTable
from evaluation import Predictor
from evaluation.prediction_files import overlay
from evaluation.video import VideoReader, find_ffmpeg
from networks import build_model
from predict import Run

TABLE = LabelTable(("road", "tree", "sky"), (7, 21, 23), ((128, 64, 128), (107, 142, 35), (70, 130, 180)))


def save_checkpoint(path, **changes):
    torch.manual_seed(1)
    settings = {"num_classes": 3, "backbone": "resnet18", "recurrence": changes.get("recurrence", 2)}
    network = build_model(**settings)
    network.head.cca.gamma.data.fill_(0.5)
    network.head.classifier.weight.data.normal_()
    contents = {
        "model": network.state_dict(),
        "network": settings,
        "recipe": {"input_size": (33, 41), "clip": changes.get("clip", 1)},
        "data": {"names": TABLE.names, "ids": TABLE.ids, "palette": TABLE.palette},
    }
    torch.save(contents, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "x_1.pth")


@pytest.fixture
def predict(call, checkpoint, tmp_path):
    """Run predict.py; results go to ``tmp_path/out``."""

    def run(*arguments, restore_from=checkpoint, output_dir=tmp_path / "out"):
        fixed = ("--restore-from", restore_from, "--output-dir", output_dir, "--gpu", "cpu", "--amp", "off")
        return call("predict.py", *fixed, "--input", *arguments)

    return run


def random_picture(*size, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)


def read(path):
    return np.asarray(Image.open(path))


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def one_error(result, status, *parts):
    assert result.status == status, result
    lines = [line for line in result.error.splitlines() if "error: " in line]
    assert len(lines) == 1, result.error
    assert "Traceback" not in result.error
    for part in parts:
        assert str(part) in lines[0]


def test_what_is_written(predict, checkpoint, tmp_path):
    image = random_picture(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    result = predict(tmp_path / "a.png")
    assert result.status == 0, result.error
    out = tmp_path / "out"
    assert written(out) == ["colour/a.png", "ids/a.png", "legend.png", "overlay/a.png"]
    ids = Predictor(checkpoint, "cpu", amp="off")(image)
    assert len(np.unique(ids)) > 1
    assert (read(out / "ids" / "a.png") == TABLE.decode(ids)).all()
    assert (read(out / "colour" / "a.png") == TABLE.colour(ids)).all()
    assert (read(out / "overlay" / "a.png") == overlay(image, ids, TABLE)).all()
    legend = read(out / "legend.png")
    for row, colour in enumerate(TABLE.palette):
        assert tuple(legend[8 + 28 * row + 5, 8 + 5]) == colour
    assert "1 images" in result.out
    assert "images/s" in result.out


def test_the_protocol(predict, checkpoint, tmp_path):
    image = random_picture(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    flags = ("--whole", "no", "--input-size", "25,33", "--scales", "0.75,1", "--flip", "--batch-size", 2)
    assert predict(tmp_path / "a.png", *flags).status == 0
    options = {"whole": False, "tile_size": (25, 33), "scales": (0.75, 1), "flip": True, "batch_size": 2}
    ids = Predictor(checkpoint, "cpu", amp="off", **options)(image)
    assert (read(tmp_path / "out" / "ids" / "a.png") == TABLE.decode(ids)).all()
    assert (ids != Predictor(checkpoint, "cpu", amp="off")(image)).any()


def test_kinds_of_pictures(predict, tmp_path, caplog):
    """All of these show the same grey picture, so all predictions are the same."""
    grey = random_picture(30, 42)[..., 0]
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    image = Image.fromarray(grey)
    image.save(folder / "grey.png")
    image.save(folder / "below" / "UPPER.PNG")
    image.convert("RGB").save(folder / "colour.TIF")
    image.convert("P").save(folder / "palette.png")
    Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)])).save(folder / "alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "bits16.png")
    (folder / "._hidden.png").write_bytes(b"Mac OS X")
    (folder / "notes.txt").write_text("no picture")
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by a quarter
    Image.fromarray(np.rot90(grey)).save(folder / "turned.png", exif=exif)
    (folder / "below" / "heic").touch()
    result = predict(folder)
    assert result.status == 0, result.error
    assert caplog.messages[0].startswith(f"{folder}: 2 of 9 files are no pictures or videos")
    assert caplog.messages[0].endswith("are left out: below/heic, notes.txt")
    names = ["alpha", "below/UPPER", "bits16", "colour", "grey", "palette", "turned"]
    out = tmp_path / "out"
    assert written(out / "ids") == [f"{name}.png" for name in names]
    expected = read(out / "ids" / "grey.png")
    for name in names:
        assert (read(out / "ids" / f"{name}.png") == expected).mean() > 0.99, name


def test_inputs_of_one_name(predict, tmp_path):
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png", tmp_path / "b" / "X.bmp"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_picture(20 + seed, 30, seed=seed)).save(path)
    result = predict(*paths, paths[0])
    assert result.status == 0, result.error
    assert "3 images" in result.out
    sizes = {path.name: read(path).shape for path in (tmp_path / "out" / "ids").iterdir()}
    assert sizes == {"x_png.png": (20, 30), "x_png_2.png": (21, 30), "X_bmp.png": (22, 30)}


def test_inputs_of_several_flags(predict, tmp_path):
    for name in ("a", "b"):
        Image.fromarray(random_picture(20, 30)).save(tmp_path / f"{name}.png")
    result = predict(tmp_path / "a.png", "--input", tmp_path / "b.png")
    assert result.status == 0, result.error
    assert written(tmp_path / "out" / "ids") == ["a.png", "b.png"]


def test_an_unreadable_file_among_others(predict, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "c"):
        Image.fromarray(random_picture(20, 30)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "d.mp4").write_bytes(b"no video")
    result = predict(folder)
    assert result.status == 1
    errors = [line for line in result.error.splitlines() if "error: " in line]
    assert len(errors) == 3
    assert "b.png: unreadable" in errors[0]
    assert "d.mp4: this video cannot be decoded" in errors[1]
    assert errors[2].endswith("2 of 4 inputs failed, see above; the others are done")
    assert written(tmp_path / "out" / "ids") == ["a.png", "c.png"]
    assert "2 images" in result.out


def test_nothing_that_can_be_read(predict, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    result = predict(tmp_path / "a.png")
    assert result.status == 1
    assert result.error.endswith("1 of 1 inputs failed, see above\n")
    assert "results are in" not in result.out


def write_video(path, frames, rate=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()


@pytest.mark.parametrize("with_ffmpeg", [False, True], ids=["OpenCV", "ffmpeg"])
@pytest.mark.parametrize("clip", [1, 3])
def test_a_video(predict, tmp_path, monkeypatch, with_ffmpeg, clip):
    if with_ffmpeg and find_ffmpeg() is None:
        pytest.skip("there is no ffmpeg: pip install imageio-ffmpeg")
    if not with_ffmpeg:
        monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
        monkeypatch.setattr(shutil, "which", lambda name: None)
    frames = [random_picture(34, 42, seed=seed) for seed in range(7)]
    write_video(tmp_path / "v.avi", frames)
    source = list(VideoReader(tmp_path / "v.avi"))
    path = save_checkpoint(tmp_path / "y_1.pth", clip=clip)
    result = predict(tmp_path / "v.avi", restore_from=path)
    assert result.status == 0, result.error
    assert "7 images" in result.out
    assert ("pip install imageio-ffmpeg" in result.error) is not with_ffmpeg
    assert written(tmp_path / "out") == ["legend.png", "overlay/v.mp4"]
    video = VideoReader(tmp_path / "out" / "overlay" / "v.mp4")
    assert video.rate == 12.5
    predictor = Predictor(path, "cpu", amp="off")
    if clip == 1:
        expected = [predictor(frame) for frame in source]
    else:
        clips = [predictor(np.stack(source[start : start + 3])) for start in (0, 3, 4)]
        expected = [*clips[0], *clips[1], clips[2][2]]
    shown = list(video)
    assert len(shown) == 7
    for picture, frame, ids in zip(shown, source, expected, strict=True):
        difference = np.abs(picture.astype(int) - overlay(frame, ids, TABLE))
        assert difference.mean() < 12  # of lossy compression, hard on these blocks


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ([0, 0.1, 0.2, 0.3], [0, 1, 2, 3]),
        ([0.04, 0.138, 0.245, 0.342], [0, 1, 2, 3]),  # rounded times
        ([0, 0, 0, 0], [0, 1, 2, 3]),  # times that are not known
        ([0, 0.01, 0.02, 0.3], [0, 1, 2, 3]),
        ([0, 0.4, 0, 0.4], [0, 0, 0, 0, 1, 2, 3]),
        ([0, 0.1, 0.4, 0.5], [0, 1, 1, 1, 2, 3]),
        ([5, 5.1, 9000, 9000.4], [0, 1, 2, 2, 2, 3]),
    ],
)
def test_frames_are_repeated_until_the_next_ones_time(tmp_path, times, shown):
    frames = [np.full((32, 48, 3), 60 * shade, np.uint8) for shade in range(4)]
    write_video(tmp_path / "v.avi", frames, rate=10)
    video = VideoReader(tmp_path / "v.avi")
    capture, clock = video._capture, iter(times)
    video._capture = SimpleNamespace(
        read=capture.read, release=capture.release, get=lambda prop: 1000 * next(clock)
    )
    assert [round(frame.mean() / 60) for frame in video] == shown


def test_the_frames_of_a_damaged_video_are_kept(predict, tmp_path):
    write_video(tmp_path / "v.avi", [random_picture(34, 42, seed=seed) for seed in range(40)])
    contents = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "v.avi").write_bytes(contents[: len(contents) // 2])
    result = predict(tmp_path / "v.avi")
    assert result.status == 1
    assert "v.avi: only " in result.error
    frames = len(list(VideoReader(tmp_path / "out" / "overlay" / "v.mp4")))
    assert 10 < frames < 30
    assert f"{frames} images" in result.out


@pytest.mark.parametrize("at", [2, 4])  # the first call is of no pictures
def test_the_frames_of_an_interrupted_video_are_kept(predict, tmp_path, monkeypatch, at):
    write_video(tmp_path / "v.avi", [random_picture(34, 42, seed=seed) for seed in range(40)])
    predict_batch, calls = Predictor.predict_batch, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict_batch(self, images)

    monkeypatch.setattr(Predictor, "predict_batch", interrupted)
    result = predict(tmp_path / "v.avi")
    assert result.status == 130
    # A thread that decodes would abort the interpreter at its end.
    assert not [thread for thread in threading.enumerate() if type(thread) is threading.Thread]
    if at == 2:
        assert "holds the" not in result.error
        assert not written(tmp_path / "out" / "overlay")
        return
    assert f"v.mp4: holds the {sum(calls[:3])} frames that were done" in result.error
    assert len(list(VideoReader(tmp_path / "out" / "overlay" / "v.mp4"))) == sum(calls[:3])
    assert [path.name for path in (tmp_path / "out" / "overlay").iterdir()] == ["v.mp4"]


@pytest.mark.parametrize(("suffix", "status"), [(".avi", 1), (".mkv", 0)])
def test_frames_are_counted_only_where_the_container_does(
    predict, tmp_path, monkeypatch, caplog, suffix, status
):
    write_video(tmp_path / f"v{suffix}", [random_picture(34, 42, seed=seed) for seed in range(4)])
    init = VideoReader.__init__

    def long_sound(reader, path):
        init(reader, path)
        reader.frames = 40

    monkeypatch.setattr(VideoReader, "__init__", long_sound)
    result = predict(tmp_path / f"v{suffix}")
    assert result.status == status, result.error
    assert ("only 4 of this video's 40 frames" in result.error) is (status == 1)
    assert ("the frames end after 0.3 of 3.2 s" in caplog.text) is (status == 0)
    assert "4 images" in result.out


def test_no_such_input(predict, tmp_path):
    one_error(predict(tmp_path / "none"), 1, tmp_path / "none", "no such input")


def test_folders_without_pictures(predict, tmp_path):
    (tmp_path / "in").mkdir()
    one_error(predict(tmp_path / "in"), 1, "in: this folder is empty")
    (tmp_path / "in" / "a.txt").touch()
    one_error(predict(tmp_path / "in"), 1, "in: no picture or video in this folder")


def test_output_folders_that_would_destroy_their_input(predict, tmp_path):
    (tmp_path / "in" / "ids").mkdir(parents=True)
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "in" / "ids" / "a.png")
    before = (tmp_path / "in" / "ids" / "a.png").read_bytes()
    one_error(predict(tmp_path / "in", output_dir=tmp_path / "in"), 2, "is the input folder")
    result = predict(tmp_path / "in" / "ids" / "a.png", output_dir=tmp_path / "in")
    one_error(result, 2, "lies where results of --output-dir")
    assert (tmp_path / "in" / "ids" / "a.png").read_bytes() == before


def test_an_output_folder_that_cannot_be_made(predict, tmp_path):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    (tmp_path / "file").touch()
    result = predict(tmp_path / "a.png", output_dir=tmp_path / "file")
    one_error(result, 1, "file: cannot write results there")


def test_checkpoints(predict, checkpoint, tmp_path):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    one_error(predict(tmp_path / "a.png", restore_from=tmp_path / "none.pth"), 1, "none.pth")
    contents = torch.load(checkpoint, weights_only=True)
    torch.save({name: contents[name] for name in ("model", "network")}, tmp_path / "nameless.pth")
    one_error(predict(tmp_path / "a.png", restore_from=tmp_path / "nameless.pth"), 1, "--num-classes 3")
    result = predict(tmp_path / "a.png", "--num-classes", 3, restore_from=tmp_path / "nameless.pth")
    assert result.status == 0, result.error
    contents["model"]["head.bottleneck.3.bias"][0] = float("nan")
    torch.save(contents, tmp_path / "nan.pth")
    one_error(predict(tmp_path / "a.png", restore_from=tmp_path / "nan.pth"), 1, "not finite")


def test_attention_pages(predict, tmp_path):
    Image.fromarray(random_picture(40, 50)).save(tmp_path / "a.png")
    result = predict(tmp_path / "a.png", "--attention")
    assert result.status == 0, result.error
    assert written(tmp_path / "out") == ["attention/a.html"]
    page = (tmp_path / "out" / "attention" / "a.html").read_text()
    assert '"picture": [40, 50], "grid": [6, 7]' in page


def test_attention_of_one_pixel(predict, tmp_path):
    image = random_picture(40, 50)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image[:20]).save(tmp_path / "small.png")
    write_video(tmp_path / "v.avi", [image])
    result = predict(tmp_path, "--attention", "30,49")
    assert result.status == 1
    errors = [line for line in result.error.splitlines() if "error: " in line]
    assert len(errors) == 3
    assert "v.avi: --attention shows pictures, not videos" in errors[0]
    assert "small.png: point 30,49 is outside: there are rows 0 to 19 and columns 0 to 49" in errors[1]
    assert "2 of 3 inputs failed" in errors[2]
    assert written(tmp_path / "out") == ["attention/a_R1.png", "attention/a_R2.png"]
    assert read(tmp_path / "out" / "attention" / "a_R1.png").shape == (40, 50, 3)


@pytest.mark.parametrize("flags", [("--whole", "no"), ("--scales", "0.5,1"), ("--flip",)])
def test_attention_is_of_the_whole_picture(predict, tmp_path, flags):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    named = " ".join(flags) if flags[0] == "--whole" else flags[0]
    one_error(predict(tmp_path / "a.png", "--attention", *flags), 2, f"--attention and {named} exclude")
    assert not (tmp_path / "out").exists()


def test_attention_that_is_not_there(predict, tmp_path):
    Image.fromarray(random_picture(20, 30)).save(tmp_path / "a.png")
    path = save_checkpoint(tmp_path / "z_1.pth", recurrence=0)
    one_error(predict(tmp_path / "a.png", "--attention", restore_from=path), 2, "R = 0")
    one_error(predict(tmp_path / "a.png", "--attention", "5;6"), 2, "--attention 5;6: expected Y,X")


def test_the_last_clip_of_a_video_reaches_back():
    seen = []

    def predictor(frames):
        seen.append(frames[:, 0, 0, 0].tolist())
        return frames[..., 0]

    predictor.clip = 3
    run = Run(SimpleNamespace(batch_size=4), predictor)
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(7)]
    ids = [one[0, 0] for _, group in run._predicted_frames(iter(frames)) for one in group]
    assert seen == [[0, 1, 2], [3, 4, 5], [4, 5, 6]]
    assert ids == list(range(7))


def test_r_may_be_given(predict, tmp_path):
    Image.fromarray(random_picture(40, 48)).save(tmp_path / "x.png")
    ids = []
    for flags in ((), ("--recurrence", 2), ("--recurrence", 0)):
        assert predict(tmp_path / "x.png", *flags).status == 0
        ids.append(read(tmp_path / "out" / "ids" / "x.png"))
    assert np.array_equal(ids[0], ids[1]) and not np.array_equal(ids[0], ids[2])


def test_a_result_does_not_take_the_place_of_a_folder(predict, tmp_path):
    (tmp_path / "in" / "A.png").mkdir(parents=True)
    for name in ("a.jpg", "A.png/in.png"):
        Image.new("RGB", (41, 33)).save(tmp_path / "in" / name)
    assert predict(tmp_path / "in").status == 0
    assert written(tmp_path / "out" / "ids") == ["A.png/in.png", "a_jpg.png"]
