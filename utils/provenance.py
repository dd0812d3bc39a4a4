"""What a run was made with: ``run.json``."""

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

PACKAGES = ("torch", "numpy", "opencv-python-headless", "pillow")


def describe(settings: dict[str, Any]) -> dict[str, Any]:
    """Command, settings, versions, git commit and machine, as plain values."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings,
        "git": git_commit(Path(__file__).resolve().parent),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        },
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cpu_threads": torch.get_num_threads(),
        },
    }


def record(path: Path, start: dict[str, Any], continues: bool) -> None:
    """Write a run's start to ``path``; one that continues the run joins the list "continued" there."""
    if continues and path.is_file():
        try:
            first = json.loads(path.read_text(encoding="utf-8"))
            start = first | {"continued": [*first.get("continued", []), start]}
        except (ValueError, TypeError):
            pass  # a kill may have cut it short: this start is recorded then
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(start, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


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
