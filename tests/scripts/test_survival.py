"""Runs that are interrupted, killed, or meet a fault, alone and as one of two processes: nothing is lost,
all end, and a resumed run ends with the same bits."""

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from dataset import find_dataset, list_samples
from tests.samples import write_pair
from tests.scripts.conftest import SMALL, THIN, log_of, same_tensors
from tests.scripts.processes import ROOT, Processes
from training.interruption import Interruption
from training.snapshots import newest_checkpoint
from utils.checkpoint import load_checkpoint

STEPS = ("--num-steps", 5, "--save-pred-every", 1)
LONG = ("--num-steps", 10**6, "--save-pred-every", 10**6)
SAVING = ("--num-steps", 10**6, "--save-pred-every", 1, "--keep-last", 2)


def start(data, folder, *more, count=1, network=THIN):
    options = ("--data-dir", data, "--snapshot-dir", folder, *network, "--batch-size", 2, *more)
    return Processes(folder.parent / "output", "train.py", *options, count=count)


def losses(folder):
    return {line["step"]: line["loss"] for line in log_of(folder) if "loss" in line}


def assert_same_run(folder, other, step):
    got, expected = (load_checkpoint(f / f"CS_scenes_{step}.pth") for f in (folder, other))
    assert same_tensors(got["model"], expected["model"])
    for index, state in expected["optimizer"]["state"].items():
        assert torch.equal(got["optimizer"]["state"][index]["momentum_buffer"], state["momentum_buffer"])
    for state, want in zip(got["random_states"], expected["random_states"], strict=True):
        assert torch.equal(state["torch"], want["torch"])


@pytest.fixture(scope="module")
def undisturbed(demo_data, tmp_path_factory):
    """For a number of processes the folder of a run of five steps that nothing interrupts."""
    folders = {}

    def run(count, network=THIN):
        key = count, network
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"undisturbed{count}") / "run"
            start(demo_data, folders[key], *STEPS, count=count, network=network).succeed()
        return folders[key]

    return run


# When the processes are killed: as soon as one of these files is there. A ResNet's checkpoints take a while.
MOMENTS = {
    "while the first checkpoint is written": "CS_scenes_1.tmp",
    "while the third checkpoint is written": "CS_scenes_3.tmp",
    "within a step": "CS_scenes_2.pth",
    "before the first step": "events.out.tfevents.*",
}


@pytest.mark.parametrize(
    ("moment", "count"),
    [*((moment, 1) for moment in MOMENTS), *((moment, 2) for moment in list(MOMENTS)[1:3])],
)
def test_killed_and_resumed_ends_with_the_same_bits(demo_data, tmp_path, undisturbed, moment, count):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *STEPS, count=count, network=SMALL)
    run.until(lambda: list(folder.glob(MOMENTS[moment])))
    run.kill(signal.SIGKILL)
    assert run.wait() == [-signal.SIGKILL] * count
    assert not (folder / "CS_scenes_5.pth").exists()

    # The number of workers may differ; the run may not.
    resumed = start(demo_data, folder, *STEPS, "--resume", "--num-workers", 1, count=count, network=SMALL)
    resumed.succeed()
    assert_same_run(folder, undisturbed(count, SMALL), 5)
    assert losses(folder) == losses(undisturbed(count, SMALL))
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_a_step(demo_data, tmp_path, undisturbed, signum, count):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *STEPS[:2], "--save-pred-every", 2, "--num-workers", 2, count=count)
    run.until(lambda: (folder / "CS_scenes_2.pth").exists())
    run.kill(signum, ranks=[count - 1])
    assert run.wait() == [128 + signum] * count
    assert f"stopped after step {newest_step(folder)}; --resume continues from there" in run.error()
    start(demo_data, folder, *STEPS, "--resume", count=count).succeed()
    assert_same_run(folder, undisturbed(count), 5)


def test_a_signal_to_one_process_in_the_last_save_is_known_to_all(demo_data, tmp_path):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *STEPS, count=2, network=SMALL)
    run.until(lambda: list(folder.glob("CS_scenes_5.tmp")))
    run.kill(signal.SIGTERM, ranks=[1])
    assert run.wait() == [143, 143]
    assert "stopped after step 5" in run.error()


def test_a_closed_terminal_stops_a_run_after_a_step(demo_data, tmp_path):
    ours, terminal = os.openpty()
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path, *SMALL, "--batch-size", 2, *LONG)
    run = subprocess.Popen(
        [sys.executable, "train.py", *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "log.jsonl").exists() and losses(tmp_path)):
        assert run.poll() is None
        assert time.monotonic() < deadline, os.read(ours, 4096)
        time.sleep(0.01)
    os.close(ours)
    assert run.wait(60) == 129
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] >= max(losses(tmp_path))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(signum):
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signum)
        assert interruption.signum == 0
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_a_signal_to_all_processes_of_the_run_workers_included(demo_data, tmp_path):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *LONG, "--num-workers", 2, count=2)
    run.until(lambda: (folder / "log.jsonl").exists() and losses(folder))
    for process in run.processes:
        for child in children(process.pid):
            os.kill(child, signal.SIGTERM)
    run.kill(signal.SIGTERM)
    assert run.wait() == [143, 143]
    step = load_checkpoint(newest_checkpoint(folder))["step"]
    assert step >= max(losses(folder))
    assert "error" not in run.error(0) + run.error(1)


@pytest.fixture
def signalled(demo_data, tmp_path, monkeypatch, call):
    """A run that sends itself these signals at each step, while its processes agree on how to go on."""

    def run(*signals):
        def agree(self, value):
            if list(tmp_path.glob("events.out.tfevents.*")):
                for signum in signals:
                    os.kill(os.getpid(), signum)
            return value

        monkeypatch.setattr("utils.distributed.Process.max", agree)
        folders = ("--data-dir", demo_data, "--snapshot-dir", tmp_path)
        return call("train.py", *folders, *THIN, "--batch-size", 2, "--num-steps", 50)

    return run


def test_a_signal_while_the_processes_agree_is_not_lost(signalled):
    assert signalled(signal.SIGTERM).status == 143


def test_a_second_interrupt_does_not_wait_for_the_step(signalled):
    status, _, error = signalled(signal.SIGINT, signal.SIGINT)
    assert status == 130
    assert error.splitlines()[-1] == "train.py: interrupted"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_within_a_step(demo_data, tmp_path, workers):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *LONG, "--num-workers", workers, "--input-size", "300,400")
    run.until(lambda: (folder / "log.jsonl").exists() and children(run.processes[0].pid))
    time.sleep(1.5)  # longer than it takes to read, shorter than a step or two
    os.kill(children(run.processes[0].pid)[0], signal.SIGKILL)
    assert_all_ended(run, 1, "a worker process that reads the data died")


def children(pid):
    """Those that load data; not the tracker of shared memory."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def assert_all_ended(run, count, message, teller=0):
    """Each process with status 1, one of them with one line that says why."""
    assert run.wait() == [1] * count
    lines = [run.error(rank).splitlines() for rank in range(count)]
    (line,) = lines[teller]
    assert line.startswith("train.py: error: ")
    assert message in line
    assert not any(lines[rank] for rank in range(count) if rank != teller)


def newest_step(folder):
    """Of the newest checkpoint, which is whole."""
    path = newest_checkpoint(folder)
    assert load_checkpoint(path)["step"] == int(path.stem.rsplit("_", 1)[1])
    return load_checkpoint(path)["step"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_met_by_one_of_two_processes(list_data, tmp_path, workers):
    folder, more = tmp_path / "run", ("--dataset", "list", "--num-classes", 3)
    lines = [write_pair(list_data, f"more {index}", seed=index) for index in range(40)]
    (list_data / "train.lst").write_text("".join(lines))
    bad = list_data / "images" / "more 7.png"
    bad.write_bytes(bad.read_bytes()[:900])
    more += ("--data-list", list_data / "train.lst", "--num-workers", workers, "--random-seed", 1)
    run = start(list_data, folder, *more, "--num-steps", 20, "--save-pred-every", 1, count=2)
    assert_all_ended(run, 2, f"process 1: {bad}: unreadable or truncated image", teller=1)
    assert newest_step(folder) > 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_dies(demo_data, tmp_path, count):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *SAVING, "--num-workers", 1, count=count)
    run.until(lambda: (folder / "CS_scenes_2.pth").exists())  # soon followed by others
    os.kill(children(run.processes[count - 1].pid)[0], signal.SIGKILL)
    message = ("process 1: " if count == 2 else "") + "a worker process that reads the data died"
    assert_all_ended(run, count, message, teller=count - 1)
    assert newest_step(folder) >= 2


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_gradient_that_is_not_finite_at_the_end(call, demo_data, tmp_path, monkeypatch, amp):
    """No later loss tells of it, and its weights must not be all that is left; fp16 leaves out the step."""
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path, *THIN, "--batch-size", 2, "--amp", amp)
    assert call("train.py", *options, "--num-steps", 1).status == 0
    monkeypatch.setattr("training.step.TrainStep.gradient_norm", lambda step: torch.tensor(float("inf")))
    result = call("train.py", *options, "--num-steps", 2, "--keep-last", 1, "--resume")
    if amp == "fp16":
        assert result.status == 0, result.error
        assert newest_step(tmp_path) == 2
    else:
        assert result.status == 1
        assert "step 2: the gradient is not finite; earlier checkpoints are kept" in result.error
        assert newest_step(tmp_path) == 1


def test_a_process_without_its_device_ends_the_others(demo_data, tmp_path):
    """As on machines with different numbers of GPUs: it joins first, so that it can tell them."""
    options = ("--data-dir", demo_data, "--snapshot-dir", tmp_path / "run", "--gpu", "$DEVICE")
    devices = ({"DEVICE": "cpu"}, {"DEVICE": "none"})
    run = Processes(tmp_path, "train.py", *options, count=2, environments=devices)
    assert run.wait() == [1, 2]
    assert run.error(0) == ""
    assert "--gpu none: expected auto, cpu, or numbers of GPUs" in run.error(1)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_processes_that_would_score_different_images(demo_data, trained, tmp_path, script):
    """As two machines whose data differ: each would count its share of another list."""
    pairs = list_samples(find_dataset(demo_data), demo_data, "val")
    lines = [" ".join(str(path.relative_to(demo_data)) for path in pair) + "\n" for pair in pairs]
    lists = [tmp_path / f"{rank}.lst" for rank in range(2)]
    for rank, path in enumerate(lists):
        path.write_text("".join(lines[rank:]))
    options = ("--data-dir", demo_data, "--gpu", "cpu", "--num-workers", 0)
    if script == "train.py":
        options += (*THIN[:-4], "--snapshot-dir", tmp_path / "run", "--batch-size", 2, "--num-steps", 2)
        options += ("--val-every", 1, "--val-list", "$LIST")
    else:
        options += ("--restore-from", trained, "--output-dir", tmp_path, "--data-list", "$LIST")
        options += ("--submission", tmp_path / "out.zip")
    environments = [{"LIST": path} for path in lists]
    run = Processes(tmp_path, script, *options, count=2, environments=environments)
    assert run.wait() == [1, 1]
    assert re.search(r"different files: .*3 images, .*, but process 1 has .*2 images, ", run.error(0))
    assert run.error(1) == ""
    assert not list(tmp_path.glob(".out.zip*"))


@pytest.mark.parametrize(
    ("flag", "values", "status", "message"),
    [
        ("--restore-from", ("0", "1"), 1, "the processes see different files: "),
        ("--scales", ("1", "0.5,1"), 2, "other settings: scales (1.0,) → (0.5, 1.0)"),
        ("--report", ("yes", "no"), 2, "other settings: report True → False"),
    ],
)
def test_processes_that_would_score_otherwise(demo_data, trained, tmp_path, flag, values, status, message):
    """Other weights at the same step, another protocol, or a report that only one would gather."""
    contents = load_checkpoint(trained)
    for name in ("0", "1"):
        torch.save(contents, tmp_path / name)
        contents["model"]["head.bottleneck.3.bias"] += 1
    values = [tmp_path / value if flag == "--restore-from" else value for value in values]
    options = ("--data-dir", demo_data, "--gpu", "cpu", "--num-workers", 0, "--output-dir", tmp_path)
    options += ("--restore-from", tmp_path / "0", flag, "$VALUE")
    environments = [{"VALUE": value} for value in values]
    run = Processes(tmp_path, "evaluate.py", *options, count=2, environments=environments)
    assert run.wait() == [status, 1]
    assert message in run.error(0)
    assert run.error(1) == ""


def test_a_loss_that_is_not_finite_in_two_processes(demo_data, tmp_path):
    folder = tmp_path / "run"
    run = start(demo_data, folder, "--num-steps", 20, "--learning-rate", 1e20, "--ohem", 0, count=2)
    assert_all_ended(run, 2, "step 2: the loss is nan; earlier checkpoints are kept")
    assert newest_checkpoint(folder) is None


@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_fills_up(demo_data, tmp_path, count):
    """A real limit, on the size of files, that comes while the run is under way."""
    folder = tmp_path / "run"
    run = start(demo_data, folder, *SAVING, count=count)
    run.until(lambda: (folder / "CS_scenes_2.pth").exists())
    hard = resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, (1_000_000, hard))
    assert_all_ended(run, count, "cannot save the checkpoint (")
    assert newest_step(folder) >= 2
    assert not list(folder.glob("*.tmp"))


def test_a_process_that_is_killed_ends_the_other(demo_data, tmp_path):
    folder = tmp_path / "run"
    run = start(demo_data, folder, *LONG, count=2)
    run.until(lambda: (folder / "log.jsonl").exists() and losses(folder))
    run.kill(signal.SIGKILL, ranks=[1])
    assert run.wait() == [1, -signal.SIGKILL]
    assert run.error() == "train.py: error: lost the connection to another process"


def test_processes_that_see_different_files(demo_data, tmp_path):
    """As two machines without a shared disk: one has a checkpoint, the other has none."""
    start(demo_data, tmp_path / "first" / "run", "--num-steps", 1).wait()
    shutil.copytree(tmp_path / "first" / "run", tmp_path / "run-0")
    options = ("--data-dir", demo_data, *THIN, "--batch-size", 2, "--num-steps", 2, "--resume")
    per_rank = tmp_path / "run-$RANK"
    run = Processes(tmp_path, "train.py", *options, "--snapshot-dir", per_rank, count=2)
    message = "the processes would start from different files: 4 images, "
    assert_all_ended(run, 2, message)
    assert "at step 1, but process 1 has" in run.error()
    assert "at step 0; all machines must see the same --data-dir and --snapshot-dir" in run.error()
