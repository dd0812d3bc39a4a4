"""What ``python -m cc_attention`` and ``python -m libs`` print: versions, self-check and advice."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cc_attention.native import Kernels

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Doctor:
    """The self-check of a package with compiled kernels.

    Attributes:
        kernels: the package's.
        operator: one of its operators, "package::name".
        compare: (device, dtype) → the results (output, gradients …) to be checked, those expected, computed
            in float64, and the error allowed relative to the largest number of each.
        expected: what computes the expected results.
    """

    kernels: Kernels
    operator: str
    compare: Callable[[str, torch.dtype], tuple[list[Tensor], list[Tensor], float]]
    expected: str

    def run(self, arguments: list[str] | None = None) -> int:
        """Print the report; exit status 1 if a result is wrong, 2 (SystemExit) for any argument."""
        argparse.ArgumentParser(
            prog=f"python -m {self.kernels.name}",
            description=f"Print versions, which implementation of {self.kernels.name} serves each device, a "
            "self-check (exit status 1 if it fails) and what would make it faster.",
        ).parse_args(arguments)
        self._print_environment()
        right = self._print_self_check()
        for line in self.advice() or ["nothing: the fastest implementation serves"]:
            print(f"to do      {line}")
        return 0 if right else 1

    def implementation(self, device_type: str) -> str:
        return self.kernels.implementation(self.operator, device_type)

    def errors(self, device: str, dtype: torch.dtype) -> tuple[float, float, float]:
        """Largest relative errors of the output and of the gradients, and the one allowed."""
        results, expected, allowed = self.compare(device, dtype)
        forward, *gradients = relative_errors(results, expected)
        return forward, torch.tensor(gradients).max().item(), allowed  # of Python's max, NaN may be lost

    def advice(self) -> list[str]:
        """What to do where something is slower than it could be."""
        lines, variable = [], self.kernels.variable
        if variable in os.environ and (better := self._without_variable()) != self.implementation("cpu"):
            lines.append(f"{variable}={os.environ[variable]} is set: without it the CPU has {better}")
        if reason := self.kernels.why_unusable():
            lines.append(reason)
            if shutil.which(os.environ.get("CXX", "c++")) is None:
                lines.append("that needs a C++ compiler; on Debian: apt install g++")
        if torch.cuda.is_available() and "CUDA kernels" not in self.implementation("cuda"):
            found = f"the nvcc found is: {version_of('nvcc')}"
            lines.append(f"CUDA kernels need nvcc of CUDA {torch.version.cuda}; {found}")
        if torch.get_num_threads() < (count := available_cores()):
            lines.append(f"{torch.get_num_threads()} of {count} cores are used: see OMP_NUM_THREADS")
        return lines

    def _without_variable(self) -> str:
        """What would serve the CPU if the environment variable were not set."""
        environment = {name: value for name, value in os.environ.items() if name != self.kernels.variable}
        script = f"import {self.kernels.name} as package; print(package.backend())"
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        return done.stdout.strip().removeprefix("CPU: ").split("; CUDA:")[0]

    def _print_environment(self) -> None:
        print(f"Python     {platform.python_version()}, {platform.system()} {platform.machine()}")
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
        print(f"PyTorch    {torch.__version__}, built for {built_for}")
        print(f"compiler   {version_of(os.environ.get('CXX', 'c++'))}")
        print(f"nvcc       {version_of('nvcc')}")
        for gpu in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            name, (major, minor) = torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu)
            print(f"GPU {gpu}      {name}, sm_{major}{minor}")
        print(f"binary     {self.kernels.binary if self.kernels.binary.exists() else 'none'}")
        print(f"CPU        {self.implementation('cpu')}; {torch.get_num_threads()} threads")
        print(f"CUDA       {self.implementation('cuda')}")

    def _print_self_check(self) -> bool:
        print(f"\n{'self-check':<10} {'dtype':<9} {'forward':>9} {'gradients':>9} {'allowed':>9}")
        all_right = True
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            for dtype in DTYPES:
                name = str(dtype).removeprefix("torch.")
                try:
                    forward, gradients, allowed = self.errors(device, dtype)
                except RuntimeError as error:
                    all_right = False
                    print(f"{device:<10} {name:<9} fails: {str(error).splitlines()[0]}")
                    continue
                right = forward <= allowed and gradients <= allowed
                all_right = all_right and right
                verdict = "right" if right else "WRONG"
                print(f"{device:<10} {name:<9} {forward:9.1e} {gradients:9.1e} {allowed:9.1e} {verdict}")
        print(f"(largest errors, relative to {self.expected} in float64)\n")
        return all_right


def relative_errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The largest error of each result relative to the largest number expected; NaN is a NaN error."""
    pairs = [(x.cpu().double(), want.cpu().double()) for x, want in zip(results, expected, strict=True)]
    return [((x - want).abs().max() / want.abs().max()).item() for x, want in pairs]


def available_cores() -> int:
    """Cores that this process may use; all cores where the system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(command: str) -> str:
    """The version line of ``command --version``, or "not found"."""
    path = shutil.which(command)
    if path is None:
        return "not found"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    # nvcc has it in the line "Cuda compilation tools, release ..."; compilers in the first one.
    return next((line for line in lines if "release" in line), "".join(lines[:1]))
