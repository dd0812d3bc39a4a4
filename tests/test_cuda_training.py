"""Training on GPUs; the tests of the scripts hold it on the CPU."""

import subprocess
import sys
import warnings

import pytest
import torch

from dataset import Batch
from networks import build_model
from tests.scripts.conftest import ROOT, log_of, same_tensors
from training.criterion import build_criterion
from training.recipes import PRECISIONS
from training.step import TrainStep, build_optimizer
from utils.checkpoint import load_checkpoint
from utils.distributed import Process

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to PyTorch"),
]

SMALL = ("--backbone", "resnet18", "--input-size", "65,81", "--num-workers", "1", "--batch-size", "4")


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_for_its_imprecise_channels_alone(amp, accumulate):
    """In half types InPlaceABN has to know them: once a step for each of two kinds of layer."""
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    network = build_model(num_classes=5, backbone="resnet18").to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(network.train(), 1e-3, 0.9, 1e-4)
    criterion = build_criterion(ohem=True, ohem_keep=640)
    step = TrainStep(network, criterion, optimizer, Process((device,)), amp, accumulate)
    step.wrap_model()
    batch = (torch.randn(4, 3, 65, 81), torch.randint(0, 5, (4, 65, 81), dtype=torch.uint8), torch.arange(4))
    batch = Batch(*(tensor.pin_memory() for tensor in batch))
    step(batch)  # the first makes workspaces and the scaler's state
    torch.cuda.set_sync_debug_mode("warn")  # at each wait for the device
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            losses, logits = step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == (0 if amp == "off" else 2), [f"{x.filename}:{x.lineno}" for x in waits]
    assert losses["loss"].isfinite()
    assert logits.is_cuda


def train(demo_data, folder, *more, launcher=()):
    """A run of the script; what it prints as an error."""
    options = ("--data-dir", demo_data, "--snapshot-dir", folder, *SMALL, *more)
    command = [sys.executable, *launcher, ROOT / "train.py", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("amp", PRECISIONS)
def test_a_deterministic_run_repeats_and_resumes(demo_data, tmp_path, amp):
    options = ("--amp", amp, "--deterministic", "--save-pred-every", 2)
    for name in "ab":
        error = train(demo_data, tmp_path / name, *options, "--num-steps", 4)
        assert "does not have a deterministic implementation" not in error
    (tmp_path / "b" / "CS_scenes_4.pth").rename(tmp_path / "repeated.pth")
    train(demo_data, tmp_path / "b", *options, "--num-steps", 4, "--resume")
    first = load_checkpoint(tmp_path / "a" / "CS_scenes_4.pth")["model"]
    for path in (tmp_path / "repeated.pth", tmp_path / "b" / "CS_scenes_4.pth"):
        assert same_tensors(load_checkpoint(path)["model"], first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("memory", [(), ("--checkpoint-activations", "--accumulate", 2)])
def test_two_gpus_have_the_losses_of_one(demo_data, tmp_path, amp, memory):
    """In one process and in two; convolutions use TF32."""
    options = (*memory, "--amp", amp, "--learning-rate", 1e-5, "--num-steps", 4, "--save-pred-every", 1)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    train(demo_data, tmp_path / "one", *options, "--gpu", "0")
    train(demo_data, tmp_path / "threads", *options, "--gpu", "0,1")
    train(demo_data, tmp_path / "processes", *options, launcher=torchrun)
    one, *others = (
        [line["loss"] for line in log_of(tmp_path / name)] for name in ("one", "threads", "processes")
    )
    for losses in others:
        assert losses == pytest.approx(one, rel=2e-3 if amp == "off" else 2e-2)
