"""gpu_first_hour.sh without a GPU: what it would run, and how it deals with parts that fail."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, path=None):
    environment = os.environ | ({} if path is None else {"PATH": path})
    command = ["bash", str(ROOT / "benchmarks" / "gpu_first_hour.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def stub(tmp_path):
    """Puts a command of a given script before all others; returns what makes one, and the path."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return make, f"{folder}:{os.environ['PATH']}"


def test_without_a_gpu_it_ends_with_one_line(stub):
    make, path = stub
    make("nvidia-smi", "exit 9")
    done = run(path=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu_first_hour.sh: error: no GPU here: nvidia-smi finds none\n"


def test_usage():
    assert run("--help").stdout.startswith("All that docs/results/GPU_TODO.md asks")
    assert run("--fast").returncode == run("one", "two").returncode == 2


def test_what_it_would_run(tmp_path):
    done = run("--dry-run", tmp_path)
    assert done.returncode == 0
    assert not any(tmp_path.iterdir())
    commands = [line.split("s  ", 1)[1] for line in done.stdout.splitlines()]
    for script in ("attention", "claims", "heads", "abn", "memory", "train_step", "loader"):
        assert any(f"benchmarks/{script}.py" in command for command in commands)
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert any(f"--tool {tool}" in command for command in commands)
    shared = (ROOT / "benchmarks" / "memory.py").read_text()
    for command in commands:
        if match := re.search(r"benchmarks/\w+\.py", command):
            source = (ROOT / match[0]).read_text()
            assert "from benchmarks" not in source or "sys.path.insert(" in source, match[0]
            source += shared if "parser_of" in source else ""
            for option in (word for word in shlex.split(command) if word.startswith("--")):
                assert f'"{option}"' in source, command


def test_failing_parts_are_noted_and_the_next_ones_run(stub, tmp_path):
    make, path = stub
    make("nvidia-smi", 'case "$*" in *compute_cap*) echo 9.0;; *) echo "NVIDIA X";; esac')
    make("python3", 'case "$*" in *heads.py*) echo "no luck"; exit 3;; *memory.py*bfloat16*) exit 124;; esac')
    make("compute-sanitizer", "exit 9")
    folder = tmp_path / "out"
    done = run(folder, path=path)
    assert done.returncode == 1
    lines = (folder / "summary.txt").read_text().splitlines()
    status = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[:-1]}
    assert status["heads"] == "FAILED with status 3: no luck"
    assert status["memory_bfloat16"].startswith("FAILED: no end")
    assert status["synccheck_libs"].startswith("FAILED with status 9")
    assert sum(text.startswith("ok") for text in status.values()) == len(status) - 9
    assert status["evaluate"].startswith("ok")
    assert lines[-1].startswith("9 parts failed or were left out, after 0 minutes")
    assert (folder / "heads.txt").read_text() == "no luck\n"
    make("compute-sanitizer", "exit 0")
    make("python3", "exit 0")
    assert run(folder, path=path).returncode == 0
