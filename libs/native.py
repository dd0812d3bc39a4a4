"""The compiled kernels: which binary is loaded, and if none, why.

The binary (``python setup.py build_ext --inplace`` makes it) registers kernels for the CPU, and for CUDA if
it was built with it, under the schemas of ``ops``. It links to LibTorch's stable interface only, so it serves
later versions of Python and PyTorch as well. This file needs the standard library only, for ``setup.py`` and
the shell scripts ask it before anything is installed.
"""

import ctypes
import hashlib
import os
import sys
from pathlib import Path

BINARY = Path(__file__).with_name("_C.abi3.so")
SOURCES = Path(__file__).with_name("csrc")
# "none" leaves the binary alone; the others ask for no more than that instruction set on the CPU.
VARIABLE, CHOICES = "LIBS_KERNELS", ("avx512", "avx2", "baseline", "none")

_REBUILD = "build them with: python setup.py build_ext --inplace"


def source_hash() -> str:
    """What the kernels are built from, in 16 hexadecimal digits: it changes with every byte of csrc/."""
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCES).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def problem() -> str | None:
    """Why the binary cannot be used, as far as can be told without loading it; None if nothing is known."""
    if not BINARY.exists():
        return f"no compiled kernels; {_REBUILD}"
    # An installed package has no csrc/ to compare with.
    if SOURCES.is_dir() and f"csrc {source_hash()}".encode() not in BINARY.read_bytes():
        return f"{BINARY} was built from other sources than those beside it; {_REBUILD}"
    return None


def load() -> str | None:
    """Load the binary, whose kernels register themselves.

    Returns:
        None, or in a few words why there are no compiled kernels. Where somebody wanted some, with a binary
        that does not fit or a word that LIBS_KERNELS does not know, a line on stderr says so too.
    """
    choice = os.environ.get(VARIABLE)
    if choice == "none":
        return f"{VARIABLE}=none"
    if choice is not None and choice not in CHOICES:
        reason: str | None = f"{VARIABLE} must be one of {', '.join(CHOICES)}; got {choice!r}"
    else:
        reason = problem()  # asked before loading: kernels of a loaded library are registered and stay
    if reason is None:
        try:
            ctypes.CDLL(str(BINARY))
            return None
        except OSError as error:
            reason = f"{BINARY} cannot be loaded ({error}); {_REBUILD}"
    if BINARY.exists():
        print(f"libs: {reason}; until then the slower PyTorch path serves", file=sys.stderr)
    return reason


def instruction_set() -> str:
    """The instruction set of the loaded CPU kernels."""
    function = ctypes.CDLL(str(BINARY)).libs_instruction_set
    function.restype = ctypes.c_char_p
    return str(function().decode())
