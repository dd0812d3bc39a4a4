"""Videos that are not as they should be, or only seem so."""

import subprocess

import numpy as np
import pytest

from dataset import DataError
from evaluation.video import VideoReader, find_ffmpeg


def test_what_is_wrong_with_a_video_is_said_once(tmp_path, capfd):
    (tmp_path / "v.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DataError, match="this video cannot be decoded"):
        VideoReader(tmp_path / "v.avi")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(find_ffmpeg() is None, reason="there is no ffmpeg: pip install imageio-ffmpeg")
def test_an_avi_that_repeats_frames_is_not_damaged(tmp_path):
    """Ten pictures in three seconds: the file counts one for each tenth of a second, new or not."""
    frames = ("-f", "lavfi", "-i", "testsrc=size=32x24:rate=10:duration=1", "-fps_mode", "vfr")
    pause = "setpts='if(lt(N,5),N,N+20)/10/TB'"
    path = tmp_path / "x.avi"
    subprocess.run(
        [find_ffmpeg(), *frames, "-vf", pause, "-c:v", "ffv1", path], check=True, capture_output=True
    )
    assert len(list(VideoReader(path))) == 30
