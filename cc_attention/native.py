"""The compiled kernels of a package: which binary is loaded, and if none, why.

``python setup.py build_ext --inplace`` makes one binary each for ``cc_attention`` and ``libs``. It registers
kernels for the CPU, and for CUDA if it was built with it, under the schemas of the package's ``ops``. It
links to LibTorch's stable interface only, so it serves later versions of Python and PyTorch as well. This
module needs the standard library only: setup.py and the shell scripts use it before anything is installed.
"""

import ctypes
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

# Values of <PACKAGE>_KERNELS: "none" loads no binary, the others allow no more than that instruction set.
CHOICES = ("avx512", "avx2", "baseline", "none")

_BUILD = "build them with: python setup.py build_ext --inplace"


class Kernels:
    """The compiled kernels of the package in a folder.

    Attributes:
        binary: the shared library, which may be missing.
        sources: the folder of its sources, which an installed package does not have.
        variable: the environment variable with one of ``CHOICES``, such as CC_ATTENTION_KERNELS.
    """

    def __init__(self, package: Path) -> None:
        self.name = package.name
        self.binary = package / "_C.abi3.so"
        self.sources = package / "csrc"
        self.variable = f"{package.name.upper()}_KERNELS"
        self._why_not_loaded: str | None = "not loaded yet"

    def source_hash(self) -> str:
        """16 hexadecimal digits that change with every byte of the sources."""
        digest = hashlib.sha256()
        for path in sorted(path for path in self.sources.rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(self.sources).as_posix()} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:16]

    def why_unusable(self) -> str | None:
        """Why the binary cannot be used, as far as can be told without loading it; or None."""
        try:
            content = self.binary.read_bytes()
        except FileNotFoundError:
            return f"no compiled kernels; {_BUILD}"
        except OSError as error:
            return f"{self.binary} cannot be read ({error.strerror}); remove it and {_BUILD}"
        if self.sources.is_dir() and f"csrc {self.source_hash()}".encode() not in content:
            return f"{self.binary} was built from other sources than those beside it; {_BUILD}"
        if b"libtorch_cuda.so" in content and not _torch_has_cuda():
            return f"{self.binary} was built with CUDA, and this PyTorch is a CPU build; {_BUILD}"
        return None

    def load(self) -> str | None:
        """Load the binary, whose kernels register themselves; PyTorch must have been imported.

        Returns:
            None, or in a few words why there are no compiled kernels. If there is a binary that is not used,
            for another reason than that the environment variable is "none", a line on stderr says so too.
        """
        self._why_not_loaded = self._load()
        if self._why_not_loaded not in (None, f"{self.variable}=none") and self.binary.exists():
            print(f"{self.name}: {self._why_not_loaded}; using the slower PyTorch path", file=sys.stderr)
        return self._why_not_loaded

    def _load(self) -> str | None:
        choice = os.environ.get(self.variable)
        if choice == "none":
            return f"{self.variable}=none"
        if choice is not None and choice not in CHOICES:
            return f"{self.variable} must be one of {', '.join(CHOICES)}; got {choice!r}"
        if reason := self.why_unusable():  # before loading: what a library has registered stays
            return reason
        try:
            ctypes.CDLL(str(self.binary))
        except OSError as error:
            return f"{self.binary} cannot be loaded ({error}); {_BUILD}"
        return None

    def instruction_set(self) -> str:
        """The instruction set of the loaded CPU kernels, such as "AVX-512"."""
        function = getattr(ctypes.CDLL(str(self.binary)), f"{self.name}_instruction_set")
        function.restype = ctypes.c_char_p
        return str(function().decode())

    def implementation(self, operator: str, device_type: str) -> str:
        """What serves an operator ("package::name") on "cpu" or "cuda", and why not something faster."""
        import torch

        if device_type == "cuda" and not torch.cuda.is_available():
            return "no GPU visible to PyTorch"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, device_type.upper()):
            reason = self._why_not_loaded or "the compiled kernels were built without CUDA"
            return f"PyTorch path ({reason})"
        return f"C++, {self.instruction_set()}" if device_type == "cpu" else "CUDA kernels"


def _torch_has_cuda() -> bool:
    """Whether the PyTorch of this environment is a CUDA build, found out without importing it."""
    spec = importlib.util.find_spec("torch")
    folders = (spec and spec.submodule_search_locations) or []
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)


KERNELS = Kernels(Path(__file__).resolve().parent)
