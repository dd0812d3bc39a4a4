"""python -m cc_attention: which implementation serves, whether it is right, and what would make it faster.

Exit status 1 if an implementation disagrees with the reference.
"""

import os
import platform
import shutil
import subprocess
import sys

import torch
from torch import Tensor

from cc_attention import criss_cross_attention, native, reference
from cc_attention.ops import implementation

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def version_of(command: str) -> str:
    """What ``command --version`` says of its version, or "not found"."""
    path = shutil.which(command)
    if path is None:
        return "not found"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    # nvcc has it in the line "Cuda compilation tools, release ..."; compilers in the first one.
    return next((line for line in lines if "release" in line), "".join(lines[:1]))


def errors(device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Largest errors of output and gradients relative to the reference in float64, and the one allowed.

    Allowed is twice what the reference itself is off by in this dtype, and one rounding (1e-13 in float64).
    """
    generator = torch.Generator().manual_seed(0)

    def random(channels: int) -> Tensor:
        return torch.randn(2, channels, 13, 37, generator=generator, dtype=torch.float64).to(dtype)

    tensors, grad = [random(channels) for channels in (8, 8, 24)], random(24)

    def results(function: object, kind: torch.dtype, place: str) -> list[Tensor]:
        leaves = [x.to(place, kind).requires_grad_() for x in tensors]
        out = function(*leaves)  # type: ignore[operator]
        return [x.cpu().double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(place, out.dtype)))]

    exact = results(reference.criss_cross_attention, torch.float64, "cpu")

    def relative(others: list[Tensor]) -> list[float]:
        pairs = zip(others, exact, strict=True)
        return [((x - want).abs().max() / want.abs().max()).item() for x, want in pairs]

    ours = relative(results(criss_cross_attention, dtype, device))
    theirs = relative(results(reference.criss_cross_attention, dtype, device))
    return ours[0], max(ours[1:]), 2 * max(theirs) + max(torch.finfo(dtype).eps, 1e-13)


def advice() -> list[str]:
    """What to do where something is slower than it could be."""
    lines = []
    reason = native.problem()
    choice = os.environ.get(native.VARIABLE)
    if choice is not None:
        lines.append(f"{native.VARIABLE}={choice} is set: unset it for the fastest kernels")
    if reason is not None:
        lines.append(reason)
    if reason is not None and shutil.which(os.environ.get("CXX", "c++")) is None:
        lines.append("a C++ compiler is needed for that; on Debian: apt install g++")
    if torch.cuda.is_available() and "CUDA kernels" not in implementation("cuda"):
        nvcc = f"the nvcc found is: {version_of('nvcc')}"
        lines.append(f"CUDA kernels need nvcc of CUDA {torch.version.cuda}; {nvcc}")
    if torch.get_num_threads() < (count := len(os.sched_getaffinity(0))):
        lines.append(f"{torch.get_num_threads()} of {count} cores are used: see OMP_NUM_THREADS")
    return lines or ["nothing: the fastest implementation serves"]


def main() -> int:
    print(f"Python     {platform.python_version()}, {platform.system()} {platform.machine()}")
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    print(f"PyTorch    {torch.__version__}, built for {built_for}")
    print(f"compiler   {version_of(os.environ.get('CXX', 'c++'))}")
    print(f"nvcc       {version_of('nvcc')}")
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name, (major, minor) = torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu)
        print(f"GPU {gpu}      {name}, sm_{major}{minor}")
    print(f"binary     {native.BINARY if native.BINARY.exists() else 'none'}")
    print(f"CPU        {implementation('cpu')}; {torch.get_num_threads()} threads")
    print(f"CUDA       {implementation('cuda')}")

    print(f"\n{'self-check':<10} {'dtype':<9} {'forward':>9} {'gradients':>9} {'allowed':>9}")
    right = True
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for dtype in _DTYPES:
            name = str(dtype).removeprefix("torch.")
            try:
                forward, gradients, allowed = errors(device, dtype)
            except RuntimeError as error:
                right = False
                print(f"{device:<10} {name:<9} fails: {str(error).splitlines()[0]}")
                continue
            good = max(forward, gradients) <= allowed
            right = right and good
            verdict = "right" if good else "WRONG"
            print(f"{device:<10} {name:<9} {forward:9.1e} {gradients:9.1e} {allowed:9.1e} {verdict}")
    print("(largest errors, relative to the reference in float64)\n")
    for line in advice():
        print(f"to do      {line}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
