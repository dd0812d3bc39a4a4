"""Compilers for CUDA kernels on a machine without a GPU, and the emulator that runs kernels there."""

import ctypes
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).parent / "cc_attention"  # the folder of cuda_emulator.h

# Loading NVRTC changes a process (its locale, for one), so it has one of its own.
NVRTC = """
import ctypes, sys
library, *options = sys.argv[1:]
nvrtc, program, size = ctypes.CDLL(library), ctypes.c_void_p(), ctypes.c_size_t()
options = [option.encode() for option in options]
source = sys.stdin.buffer.read()
assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
log = ctypes.create_string_buffer(size.value)
nvrtc.nvrtcGetProgramLog(program, log)
sys.stderr.buffer.write(log.value)
if status != 0:
    sys.exit(status)
nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
binary = ctypes.create_string_buffer(size.value)
nvrtc.nvrtcGetCUBIN(program, binary)
sys.stdout.buffer.write(binary.raw)
"""


def tool(path: str | None, what: str) -> str:
    """CI has all of the tools; elsewhere a test without its tool is skipped."""
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{what} is missing")
    return path


def compile_emulated(source: Path, kernels: Path, target: Path, *flags: str) -> Path:
    """A C++ file that runs the kernel headers of a folder on the emulator."""
    command = [tool(shutil.which("g++"), "g++"), "-std=c++17", "-pthread"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [*flags, f"-I{kernels}", f"-I{EMULATOR}", "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    return target


def load_emulated(source: Path, kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library; pytest's workers share what the first that asks has compiled."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    library = folder / f"{source.stem}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_emulated(source, kernels, library, "-O1", "-fPIC", "-shared")
    return ctypes.CDLL(str(library))


def check_sanitized(program: Path, arguments: str) -> None:
    """Run a program that was compiled with sanitizers, which find nothing."""
    command = [str(program), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:  # older sanitizers on kernels that place memory freely
        done = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@functools.cache
def nvrtc() -> str:
    """The compiler of the wheel nvidia-cuda-nvrtc-cu12, the last one that knows sm_50 being of CUDA 12."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(x) / "cuda_nvrtc" / "lib" for x in spec.submodule_search_locations or ()] if spec else []
    found = next((x / "libnvrtc.so.12" for x in folders if (x / "libnvrtc.so.12").is_file()), None)
    return tool(found and str(found), "NVRTC of the wheel nvidia-cuda-nvrtc-cu12==12.4.127")


def compile_with_nvrtc(text: str, kernels: Path, architecture: str) -> bytes:
    """The binary for one architecture, of nothing but the text and the headers of a folder.

    -G: without optimization, which takes a fraction of the time. What the language and the architecture lack
    is reported all the same.
    """
    options = ["-std=c++17", "-G", f"-I{kernels}", f"-arch={architecture}"]
    command = [sys.executable, "-c", NVRTC, nvrtc(), *options]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return done.stdout


@functools.cache
def nvcc_architectures() -> tuple[str, list[int]]:
    """nvcc, and the architectures that it knows: 75, 80 …"""
    nvcc = tool(shutil.which("nvcc"), "nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    return nvcc, sorted(int(x) for x in re.findall(r"compute_(\d+)\b", listed))


def run_nvcc(*arguments: str) -> str:
    """What it prints, which is no warning."""
    nvcc, _ = nvcc_architectures()
    done = subprocess.run([nvcc, "-std=c++17", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def compile_launcher(source: Path, target: Path) -> None:
    """A launcher with its kernels, for nvcc's lowest architecture, against PyTorch's stable ABI of 2.11."""
    include = Path(torch.__file__).parent / "include"
    lowest = nvcc_architectures()[1][0]
    run_nvcc(
        *("-G", "-c", str(source), "-o", str(target), "-Xcompiler", "-fPIC"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        *(f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"),
        f"-gencode=arch=compute_{lowest},code=sm_{lowest}",
    )
