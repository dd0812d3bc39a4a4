"""Errors that are answered with one line, and packages that only this room needs."""

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

from utils.checkpoint import CheckpointError
from utils.distributed import DeviceError, PeerError, exit_process, is_out_of_memory

HOW_TO_INSTALL = (
    "instances/run_local.sh makes an environment that has it; by hand: "
    "python3 -m venv .venv-instances && .venv-instances/bin/pip install -r instances/requirements.txt"
)


class InstancesError(ValueError):
    """Data, weights or settings that cannot be used: one line that says what, where and what to do."""

    exit_status = 1


class UsageError(InstancesError):
    """Options that do not go together."""

    exit_status = 2


def require(name: str) -> ModuleType:
    """Import torchvision or pycocotools, or a module of theirs.

    Raises:
        InstancesError: it is missing or cannot be loaded; the line says how to get it.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        # A torchvision that was built for another torch raises RuntimeError about its operators.
        package = name.split(".")[0]
        reason = (
            "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        )
        raise InstancesError(f"{package} {reason}; {HOW_TO_INSTALL}") from None


def run_script(program: str, main: Callable[[], None]) -> None:
    """Run a script's main function; a user's mistake ends it with one line and its exit status."""
    status = 0
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"process {rank}: "
    try:
        main()
    except PeerError:
        status = 1  # another process says why
    except (InstancesError, CheckpointError, DeviceError, OSError) as error:
        print(f"{program}: error: {where}{error}", file=sys.stderr)
        status = 2 if isinstance(error, DeviceError) else getattr(error, "exit_status", 1)
    except RuntimeError as error:
        if is_out_of_memory(error):
            reason = "out of memory; lower --batch-size or --min-size"
        elif "DataLoader worker" in str(error):
            reason = f"a worker process that reads the data died ({str(error).splitlines()[0]})"
        else:
            raise
        print(f"{program}: error: {where}{reason}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        status = 130
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    exit_process(status)
