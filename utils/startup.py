"""What a script sets up before its other imports, which take seconds; of the standard library only.

From then on Ctrl-C ends the script with one line, a console that cannot show a character gets a replacement,
and glibc leaves fewer holes in the memory of a long run on a CPU (``memory`` gives back the others).
"""

import os
import sys

M_ARENA_MAX = -8  # glibc's malloc.h


def prepare() -> None:
    """To be called before a script's other imports."""
    sys.excepthook = _interrupted_early
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, interrupted)
    sys.excepthook = sys.__excepthook__
    _replace_what_cannot_be_shown()
    _limit_fragmentation()


def interrupted(_: int, __: object) -> None:
    """What SIGINT does until the script runs: end it with one line."""
    os.write(2, f"\n{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(130)


def _interrupted_early(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Ctrl-C while ``signal`` is read, before which there is no handler to set."""
    if kind is KeyboardInterrupt:
        interrupted(0, None)
    sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


def _replace_what_cannot_be_shown() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _limit_fragmentation() -> None:
    """Few arenas of glibc; with its defaults a run grows faster.

    Its thresholds stay as they are: a fixed one maps every large tensor anew, which costs a fifth of a step.
    """
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version") and "MALLOC_ARENA_MAX" not in os.environ:
            libc.mallopt(M_ARENA_MAX, 2)
    except OSError:
        pass  # a system whose C library cannot be asked
