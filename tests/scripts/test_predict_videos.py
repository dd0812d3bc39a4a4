"""Predictions of videos from the command line."""

import os
import shutil
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation import Predictor
from evaluation.prediction_files import overlay
from evaluation.video import VideoReader, find_ffmpeg
from predict import Run
from tests.scripts.conftest import TABLE, random_picture, save_checkpoint, write_video, written


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
