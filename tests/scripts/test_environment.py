"""Accidents around a script: an early Ctrl-C, a poor console, another system, a killed run started again."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

from tests.scripts.conftest import SMALL
from tests.scripts.processes import ROOT
from training.snapshots import Snapshots
from utils.checkpoint import CheckpointError


def run_python(*arguments, cwd=ROOT, **environment):
    """A Python of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_ctrl_c_while_modules_are_imported(script):
    """The signal comes when the script's first import is done, long before the others."""
    code = (
        "import os, signal, runpy, sys, threading\n"
        "sys.path.insert(0, os.getcwd())\n"
        "class Notice:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Notice())\n"
        f"sys.argv = ['{script}', '--help']\n"
        f"runpy.run_path('{script}', run_name='__main__')\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 130
    assert result.stderr.strip() == f"{script}: interrupted"


def test_a_script_started_with_ctrl_c_ignored_stays_deaf_to_it():
    """As in the background of a shell script."""
    code = (
        "import signal; from utils import startup\n"
        "signal.signal(2, signal.SIG_IGN); startup.prepare(); print(repr(signal.getsignal(2)))"
    )
    assert "SIG_IGN" in run_python("-c", code).stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_console_that_is_not_utf8(encoding):
    result = run_python("train.py", "--help", PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert "scale images by 0.7, 0.8 \\u2026 2.1" in " ".join(result.stdout.split())


def test_a_system_without_linux_calls(demo_data, tmp_path):
    """macOS has neither CPU affinity nor posix_fallocate."""
    arguments = ["train.py", "--data-dir", str(demo_data), "--snapshot-dir", str(tmp_path), *SMALL]
    arguments += ["--batch-size", "2", "--num-steps", "1", "--ohem", "0"]
    code = (
        "import os, runpy, sys\n"
        "for name in ('sched_getaffinity', 'sched_setaffinity', 'posix_fallocate'): delattr(os, name)\n"
        f"sys.argv = {arguments}\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    result = run_python("-c", code, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "CS_scenes_1.pth").exists()


def test_the_lock_of_a_killed_run_goes_with_it(tmp_path):
    """Although a data worker, a child of the run, lives on for a while."""
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom training.snapshots import Snapshots\n"
        "with Snapshots(Path(sys.argv[1]), 'x').locked():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        time.sleep(30)\n        os._exit(0)\n"
        "    print(child, flush=True)\n    time.sleep(30)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(run.stdout.readline())
    try:
        with (
            pytest.raises(CheckpointError, match="another run is writing there"),
            Snapshots(tmp_path, "x").locked(),
        ):
            pass
        run.kill()
        run.wait()
        os.kill(child, 0)  # it is there
        with Snapshots(tmp_path, "x").locked():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        run.stdout.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train.py", "--input-size", "10000000000,10000000000"),
        ("evaluate.py", "--input-size", "1000000000,9"),
    ],
)
def test_sizes_that_nobody_can_mean(call, demo_data, tmp_path, arguments):
    script, *options = arguments
    result = call(
        script, "--data-dir", demo_data, *options, *(("--restore-from", tmp_path) if "eval" in script else ())
    )
    assert result.status == 2
    assert "expected a height and width of at most 32768" in result.error
    assert result.error.count("\n") == 1


def test_scores_that_cannot_be_written_leave_no_file(call, demo_data, trained, tmp_path, monkeypatch):
    write = pathlib.Path.write_text

    def full(self, *arguments, **options):
        if "metrics" in self.name:
            write(self, "", **options)
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", trained, "--gpu", "cpu",
        "--num-workers", "0", "--output-dir", tmp_path / "r",
    )  # fmt: skip
    assert result.status == 1
    assert f"{tmp_path}/r/metrics.json: cannot write the scores (No space left" in result.error
    assert not list((tmp_path / "r").iterdir())


def test_weights_that_are_not_numbers_are_said(call, demo_data, trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["model"]["head.bottleneck.3.bias"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", tmp_path / "nan.pth", "--gpu", "cpu",
        "--num-workers", "0", "--output-dir", tmp_path / "r",
    )  # fmt: skip
    assert result.status == 1
    assert result.error.strip().splitlines()[-1].startswith("evaluate.py: error: ")
    assert "not finite" in result.error or "NaN" in result.error
    assert not (tmp_path / "r" / "metrics.json").exists()
