"""Builds the compiled kernels where that is possible; pyproject.toml holds everything else.

    python setup.py build_ext --inplace      for work in this folder
    pip install -e . --no-build-isolation    as a package

C++ for the CPU, and CUDA where PyTorch is a CUDA build and nvcc of its major version is found. What is
missing is left out with a line that says so, and the install succeeds: without kernels the PyTorch path
serves. CUDA kernels are built for sm_50, 52 and 61 and for the visible GPUs, or if none is visible for sm_80
and 90, as far as nvcc knows them; later GPUs compile the PTX of the last.

    FORCE_CUDA=1             an error instead, where CUDA kernels cannot be built
    CUDA_GENCODE             nvcc's -gencode flags, taken as they are
    TORCH_CUDA_ARCH_LIST     architectures as PyTorch's own builds take them: "8.0;9.0+PTX"
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGES = ["cc_attention", "libs"]
DEFAULT_ARCHITECTURES = ["50", "52", "61"]
# Added where no GPU is visible: the data centre GPUs whose tensor cores the kernels use.
TENSOR_CORE_ARCHITECTURES = ["80", "90"]
# Added where no GPU is visible either, by toolkits that no longer know the defaults.
LOWEST_ARCHITECTURE = "75"


def say(message: str) -> None:
    print(f"ccnet: {message}", flush=True)


def find_torch():
    """PyTorch, or None. In pip's isolated build, the PyTorch of the environment that is installed into."""
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("platlib"))
        try:
            import torch
        except ImportError:
            return None
    return torch


def cuda_home(nvcc: str) -> str:
    """The toolkit that nvcc belongs to, by its own word: nvcc may be a wrapper script somewhere else."""
    answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", answer.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1).strip() if top else Path(nvcc).resolve().parent.parent)


def why_no_cuda(torch_cuda: str | None, nvcc: str | None) -> str | None:
    """What stands against CUDA kernels, in a few words."""
    if torch_cuda is None:
        return "this PyTorch is a CPU build"
    if nvcc is None:
        return "no nvcc on the PATH or in CUDA_HOME"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None:
        return f"{nvcc} does not tell its version"
    if release.group(1) != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {release.group(1)} and PyTorch of CUDA {torch_cuda}"
    return None


def gencode_flags(supported: list[str], visible: list[str]) -> tuple[list[str], str]:
    """nvcc's architecture flags and why these.

    Args:
        supported: what the toolkit can build for, such as ["75", "80"].
        visible: the GPUs of this machine, likewise.
    """
    if wish := os.environ.get("CUDA_GENCODE"):
        return wish.split(), f"CUDA_GENCODE={wish}"
    if wish := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return [], f"TORCH_CUDA_ARCH_LIST={wish}"  # PyTorch's build tools read it themselves
    dropped = [arch for arch in DEFAULT_ARCHITECTURES if arch not in supported]
    wanted = [*DEFAULT_ARCHITECTURES, *(visible or TENSOR_CORE_ARCHITECTURES)]
    if dropped == DEFAULT_ARCHITECTURES and not visible:
        wanted.append(LOWEST_ARCHITECTURE)
    chosen = sorted({arch for arch in wanted if arch in supported} or supported[:1], key=int)
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    last = chosen[-1]
    flags.append(f"-gencode=arch=compute_{last},code=compute_{last}")  # PTX: later GPUs compile it themselves
    reason = f"sm_{', sm_'.join(chosen)} and PTX of the last"
    if visible:
        reason += f"; visible GPUs: sm_{', sm_'.join(sorted(set(visible), key=int))}"
    else:
        reason += "; no GPU is visible"
    if dropped:
        reason += f"; this nvcc no longer knows the defaults sm_{', sm_'.join(dropped)}"
    return flags, reason


def source_hash(package: str) -> str:
    """The hash by which ``cc_attention.native`` knows the package's binary, without importing a package."""
    spec = importlib.util.spec_from_file_location("native", ROOT / "cc_attention" / "native.py")
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native.Kernels(ROOT / package).source_hash()


def extensions(torch) -> list:
    from torch.utils import cpp_extension

    nvcc = shutil.which("nvcc", path=os.pathsep.join(nvcc_folders()))
    reason = why_no_cuda(torch.version.cuda, nvcc)
    nvcc_flags = []
    if reason is None:
        cpp_extension.CUDA_HOME = cuda_home(nvcc)
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        supported = sorted(re.findall(r"compute_(\d+)\b", known), key=int)
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        visible = ["{}{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus]
        nvcc_flags, chosen = gencode_flags(supported, visible)
        say(f"building C++ and CUDA kernels for {chosen}")
    elif os.environ.get("FORCE_CUDA") == "1":
        sys.exit(f"error: FORCE_CUDA=1, but CUDA kernels cannot be built: {reason}")
    else:
        say(f"building C++ kernels; none for CUDA: {reason}")
    make = cpp_extension.CppExtension if reason else cpp_extension.CUDAExtension
    patterns = ["*.cpp"] if reason else ["*.cpp", "*.cu"]
    made = []
    for package in PACKAGES:
        folder = ROOT / package / "csrc"
        files = [path for pattern in patterns for path in folder.rglob(pattern)]
        macros = [
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # PyTorch 2.11 and all later ones
            ("CSRC_HASH", f'"csrc {source_hash(package)}"'),
        ] + ([] if reason else [("USE_CUDA", None)])
        made.append(
            make(
                f"{package}._C",
                sorted(str(path.relative_to(ROOT)) for path in files),
                define_macros=macros,
                extra_compile_args={"cxx": ["-O3", "-g0"], "nvcc": ["-O3", *nvcc_flags]},
                py_limited_api=True,  # no Python in it at all: one file serves all of them
                optional=True,
            )
        )
    return made


def nvcc_folders() -> list[str]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]


def tolerant_build(base: type) -> type:
    """PyTorch's build command, for which a failed build is a line and not the end of the install."""

    class Build(base):
        def finalize_options(self) -> None:
            super().finalize_options()
            # What build/ holds may be of another PyTorch, CUDA or compiler: ninja tells, file times do not.
            self.force = True

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if os.environ.get("FORCE_CUDA") == "1":
                    raise
                say(f"no compiled kernels, the build failed ({error}); the slower PyTorch path will serve")

        def copy_file(self, source, target, *args, **kwargs):
            # Not into the old file: a process that runs with it, training perhaps, has it mapped.
            Path(target).unlink(missing_ok=True)
            return super().copy_file(source, target, *args, **kwargs)

    return Build


def main() -> None:
    torch = find_torch()
    if torch is None:
        say(
            "no compiled kernels: no PyTorch to build them with; install it first and use"
            " pip install -e . --no-build-isolation"
        )
        if os.environ.get("FORCE_CUDA") == "1":
            sys.exit("error: FORCE_CUDA=1 needs PyTorch")
        setup()
        return
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=extensions(torch), cmdclass={"build_ext": tolerant_build(BuildExtension)})


if __name__ == "__main__":
    main()
