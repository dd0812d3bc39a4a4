"""Videos: frames in, and frames out as an .mp4 that common players open."""

import importlib
import logging
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dataset import DataError
from utils.arguments import OutputError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
# These store how many frames they hold. For others OpenCV multiplies the duration (of the sound, if that is
# longer) by a rate, and undamaged videos can have far fewer frames.
COUNTED_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi")
LONGEST_PAUSE = 60  # seconds from one frame to the next; more is taken for a leap of the file's clock
NO_H264 = (
    "no ffmpeg was found, so videos are MPEG-4 Part 2, which VLC and the like play but browsers do not; "
    "pip install imageio-ffmpeg gives H.264"
)
logger = logging.getLogger(__name__)

# What is wrong with a file is said here, once.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
if "OPENCV_LOG_LEVEL" not in os.environ:  # which OpenCV reads when it is imported
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)


class VideoReader:
    """The frames of a video at a constant rate, turned upright as its metadata say.

    A frame is repeated until the time of the next one, and none is left out. So a video of variable rate
    keeps its duration, but for passages of more frames a second than ``rate``, which become slower.

    Attributes:
        frames: about how many there should be; 0: not known.
        rate: frames a second.

    Raises:
        DataError: not a video that can be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise DataError(f"{path}: this video cannot be decoded")
        frames, rate = self._capture.get(cv2.CAP_PROP_FRAME_COUNT), self._capture.get(cv2.CAP_PROP_FPS)
        self.frames = max(int(frames), 0) if math.isfinite(frames) else 0
        self.rate = Fraction(rate).limit_denominator(1001) if 0 < rate < 1000 else Fraction(25)

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H,W,3) uint8 RGB of each frame, in order, 1 / ``rate`` seconds apart.

        Raises:
            DataError: after the last frame, if there is none or clearly fewer than the file says.
        """
        read = shown = 0
        clock = latest = 0.0  # seconds
        before = None
        try:
            while True:
                decoded, frame = self._capture.read()
                if not decoded:
                    break
                frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if before is None:
                    latest = time
                elif latest < time <= latest + LONGEST_PAUSE:
                    clock += time - latest
                latest = max(latest, time)  # some containers do not know the time of every frame and give 0
                while before is not None and shown < round(clock * self.rate):
                    shown += 1
                    yield before
                read, shown, before = read + 1, shown + 1, frame
                yield frame
        finally:
            self._capture.release()
        if read == 0:
            raise DataError(f"{self.path}: no frame of this video can be decoded")
        suffix = self.path.suffix.lower()
        if suffix in COUNTED_SUFFIXES:
            found = shown if suffix == ".avi" else read  # an .avi counts frames that repeat the one before
            if found < 0.95 * self.frames - 2:
                raise DataError(
                    f"{self.path}: only {found} of this video's {self.frames} frames can be decoded"
                )
        elif shown < 0.95 * self.frames - 2:
            seconds, whole = float(shown / self.rate), float(self.frames / self.rate)
            logger.warning(
                "%s: the frames end after %.1f of %.1f s: its sound is longer, or the file was cut off",
                *(self.path, seconds, whole),
            )


def find_ffmpeg() -> str | None:
    """The program ffmpeg: that of the package imageio-ffmpeg, or of the system; None if there is neither."""
    with suppress(ImportError, RuntimeError):
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    return shutil.which("ffmpeg")


class VideoWriter:
    """An .mp4: H.264 by ffmpeg where there is one, otherwise MPEG-4 Part 2 by OpenCV.

    It is written under a temporary name and gets its own by ``close``. Sides of odd length are repeated once
    at their end, since the players' colour format needs even ones.

    Raises:
        OutputError: (also ``write`` and ``close``) it cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction, ffmpeg: str | None) -> None:
        self.path, self._temporary = path, path.with_name(f".{path.name}.tmp.mp4")
        height, width = (side + side % 2 for side in size)
        self._padding = ((0, height - size[0]), (0, width - size[1]), (0, 0))
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: Any = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.touch()
        except OSError as error:
            raise OutputError(f"{path}: cannot write this video ({error.strerror})") from None
        if ffmpeg is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(
                str(self._temporary), cv2.CAP_FFMPEG, code, float(rate), (width, height)
            )
            if not self._writer.isOpened():
                self._fail("OpenCV cannot encode it")
            return
        self._process = subprocess.Popen(
            [
                *(ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"),
                *("-s", f"{width}x{height}", "-r", str(rate), "-i", "-", "-an"),
                *("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-pix_fmt", "yuv420p"),
                *("-movflags", "+faststart", str(self._temporary)),
            ],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must not end it before the frames that are done are in the file
        )

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, (H,W,3) uint8 RGB."""
        frame = np.pad(frame, self._padding, mode="edge")
        if self._process is None:
            self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frame.tobytes())
        except OSError:  # it has ended
            self._fail(self._end_process())

    def close(self) -> None:
        """Complete the file and give it its name."""
        if self._process is None:
            self._writer.release()
        elif reason := self._end_process():
            self._fail(reason)
        try:
            if not self._temporary.stat().st_size:
                self._fail("nothing was written, is the disk full?")
            self._temporary.replace(self.path)
        except OSError as error:
            self._fail(error.strerror)

    def discard(self) -> None:
        """End without a file."""
        if self._process is not None:
            self._end_process()
        elif self._writer is not None:
            self._writer.release()
        self._temporary.unlink(missing_ok=True)

    def _end_process(self) -> str:
        """Wait for ffmpeg; returns what went wrong, or nothing."""
        assert self._process is not None
        try:
            _, errors = self._process.communicate()
        except (OSError, ValueError):  # its input is closed already
            errors = b""
            self._process.wait()
        if not self._process.returncode:
            return ""
        lines = errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ffmpeg ended with status {self._process.returncode}"

    def _fail(self, reason: str | None) -> None:
        self._temporary.unlink(missing_ok=True)
        raise OutputError(f"{self.path}: cannot write this video ({reason})")
