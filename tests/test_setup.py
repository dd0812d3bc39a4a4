"""The build: what it chooses, and that no missing tool makes an install fail."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ccnet_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch):
    for name in ("CUDA_GENCODE", "TORCH_CUDA_ARCH_LIST", "FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvcc(tmp_path):
    """Makes an nvcc that is a wrapper script, says a version and lies nowhere near its toolkit."""

    def make(release):
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir()
        path.write_text(
            f'#!/bin/sh\ncase "$1" in\n--dryrun) echo "#$ TOP={tmp_path}/cuda/bin/.." >&2;;\n'
            f'*) echo "Cuda compilation tools, release {release}, V{release}.1";;\nesac\n'
        )
        path.chmod(0o755)
        return str(path)

    return make


def gencodes(flags):
    return [flag.removeprefix("-gencode=arch=compute_") for flag in flags]


def test_default_architectures_where_the_toolkit_has_them(build):
    flags, reason = build.gencode_flags(["50", "52", "60", "61", "75", "80", "86", "90"], [])
    assert gencodes(flags) == [f"{n},code=sm_{n}" for n in (50, 52, 61, 80, 90)] + ["90,code=compute_90"]
    assert reason == "sm_50, sm_52, sm_61, sm_80, sm_90 and PTX of the last; no GPU is visible"
    flags, _ = build.gencode_flags(["50", "52", "60", "61", "75"], [])  # CUDA 10
    assert gencodes(flags) == ["50,code=sm_50", "52,code=sm_52", "61,code=sm_61", "61,code=compute_61"]


def test_visible_gpus_are_added_and_dropped_defaults_named(build):
    flags, reason = build.gencode_flags(["75", "80", "90", "100"], ["90", "90"])
    assert gencodes(flags) == ["90,code=sm_90", "90,code=compute_90"]
    assert "visible GPUs: sm_90" in reason
    assert "no longer knows the defaults sm_50, sm_52, sm_61" in reason
    flags, _ = build.gencode_flags(["50", "52", "61", "80", "86", "90"], ["86"])
    assert gencodes(flags) == [f"{n},code=sm_{n}" for n in (50, 52, 61, 86)] + ["86,code=compute_86"]


def test_a_toolkit_without_any_of_them_builds_for_later_ones(build):
    flags, _ = build.gencode_flags(["75", "80", "90", "100"], [])
    assert gencodes(flags) == ["75,code=sm_75", "80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]
    flags, _ = build.gencode_flags(["100", "120"], [])
    assert gencodes(flags) == ["100,code=sm_100", "100,code=compute_100"]


def test_wishes_come_first(build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert build.gencode_flags(["75"], []) == ([], "TORCH_CUDA_ARCH_LIST=8.0;9.0+PTX")
    wish = "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_86,code=sm_86"
    monkeypatch.setenv("CUDA_GENCODE", wish)
    assert build.gencode_flags(["75"], ["90"]) == (wish.split(), f"CUDA_GENCODE={wish}")


def test_toolkit_behind_a_wrapper_script(build, nvcc, tmp_path):
    assert build.cuda_home(nvcc("13.0")) == str(tmp_path / "cuda")


def test_what_stands_against_cuda(build, nvcc):
    path = nvcc("12.4")
    assert build.why_no_cuda(None, path) == "this PyTorch is a CPU build"
    assert build.why_no_cuda("13.0", None) == "no nvcc on the PATH or in CUDA_HOME"
    assert build.why_no_cuda("13.0", path) == "nvcc is of CUDA 12 and PyTorch of CUDA 13.0"
    assert build.why_no_cuda("12.8", path) is None


@pytest.fixture
def tree(tmp_path):
    """The files of a build, without any built before."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("cc_attention", "libs"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    return tmp_path


def setup(tree, *arguments, **variables):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_build_succeeds_and_says_so(tree):
    result = setup(tree, "build_ext", "--inplace", CC="/no/compiler", CXX="/no/compiler")
    assert result.returncode == 0, result.stderr
    assert "ccnet: no compiled kernels, the build failed" in result.stdout
    assert not list(tree.rglob("*.so"))


def test_installs_without_a_compiler_as_a_package(tree):
    target = tree / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*command, "--target", str(target), "."],
        cwd=tree,
        env=os.environ | {"CC": "/no/compiler", "CXX": "/no/compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in target.iterdir()} >= {"cc_attention", "libs"}
    assert not {path.name for path in target.iterdir()} & {"tests", "utils", "networks", "dataset"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch can build for CUDA")
def test_force_cuda_makes_absence_an_error(tree):
    result = setup(tree, "build_ext", "--inplace", FORCE_CUDA="1")
    assert result.returncode == 1
    message = "error: FORCE_CUDA=1, but CUDA kernels cannot be built: this PyTorch is a CPU build"
    assert message in result.stderr
    assert "Traceback" not in result.stderr
