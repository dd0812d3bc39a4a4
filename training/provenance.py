"""``run.json``, and the summary printed at the start of a run."""

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.options import RunOptions
from training.recipes import Recipe, recipe_to_dict
from training.step import TrainStep
from utils.fields import to_dict
from utils.files import write_atomically

PACKAGES = ("torch", "numpy", "opencv-python-headless", "pillow")


def describe(recipe: Recipe, options: RunOptions, first_step: int = 0, processes: int = 1) -> dict[str, Any]:
    """Command, settings, versions, git commit and machine, as plain values."""
    values = recipe.network.to_dict() | recipe_to_dict(recipe) | to_dict(options)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings,
        "git": git_commit(Path(__file__).resolve().parent),
        "versions": versions(),
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cpu_threads": torch.get_num_threads(),
        },
        "first_step": first_step,
        "processes": processes,
    }


def versions() -> dict[str, Any]:
    """Versions of Python, packages and CUDA, by name."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
    }


def summary(
    recipe: Recipe, options: RunOptions, train_step: TrainStep, num_images: int, first_step: int
) -> list[str]:
    """What the run will do, in lines to be printed."""
    process, network = train_step.process, recipe.network
    height, width = recipe.input_size
    parameters = sum(x.numel() for x in train_step.network.parameters()) / 1e6
    names = [torch.cuda.get_device_name(x) if x.type == "cuda" else "CPU" for x in process.devices]
    where = ", ".join(names)
    if process.world_size > 1:
        where += f" in each of {process.world_size} processes"
    precision = {"off": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast, scaled loss"}[recipe.amp]
    extras = {"compiled": options.compile, "activation checkpointing": options.checkpoint_activations}
    extras |= {f"batches in {recipe.accumulate} parts": recipe.accumulate > 1}
    extras |= {"deterministic": options.deterministic}
    how = ", ".join([precision, *(name for name, on in extras.items() if on)])
    what = f"{network.model} on {network.backbone}"
    what += f", R={network.recurrence}" if network.model == "ccnet" else ""
    images = recipe.batch_size
    epochs = recipe.num_steps * images / num_images
    lines = [
        f"crops     {height}x{width}, {options.num_workers} workers a process",
        f"network   {what}, {network.num_classes} classes, {parameters:.2f} M parameters",
        f"device    {where}; {how}",
        f"steps     {first_step} → {recipe.num_steps} of {images} images, {epochs:.4g} epochs in all",
        f"writes    {options.snapshot_dir}/ (checkpoints, run.json, log.jsonl, TensorBoard events)",
    ]
    if options.restore_from is None and first_step == options.start_iters:
        lines.append(
            "note      no --restore-from: the backbone starts from random weights, not from ImageNet"
        )
    return lines


def write_run_file(path: Path, start: dict[str, Any], continues: bool) -> None:
    """Write a run's start to ``path``; one that continues the run goes into the list "continued" there."""
    if continues and path.is_file():
        try:
            first = json.loads(path.read_text(encoding="utf-8"))
            start = {**first, "continued": [*first.get("continued", []), start]}
        except (ValueError, TypeError, AttributeError):
            pass  # a kill may have cut it short, or it is another's: this start is recorded instead
    write_atomically(path, json.dumps(start, indent=1) + "\n")


def git_commit(directory: Path) -> dict[str, Any] | None:
    """The commit of a folder's repository and whether files differ from it; None if there is none."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(_git(directory, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ("git", "-C", str(directory), *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
