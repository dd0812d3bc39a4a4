"""Errors that are answered with one line, and packages that only this folder needs."""

import importlib
from types import ModuleType

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
