"""Command lines: flags made from dataclass fields, and one clear line for whatever is wrong."""

import argparse
import os
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils import startup
from utils.distributed import exit_process, is_out_of_memory, world_size
from utils.fields import choices_of

Options = TypeVar("Options")
NONE = "none"  # an empty tuple
MAX_SIDE = 2**15  # pixels; whatever is larger was mistyped, and could not be allocated


class UsageError(ValueError):
    """A command line that cannot be obeyed."""

    exit_status = 2


class OutputError(RuntimeError):
    """Results that cannot be written: one line that names the folder and the reason."""

    exit_status = 1


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers mistakes with one line and exit status 2."""

    def __init__(self, description: str | None, add_help: bool = True) -> None:
        super().__init__(description=description, allow_abbrev=False, add_help=add_help)

    def error(self, message: str) -> NoReturn:
        is_main = os.environ.get("RANK", "0") == "0"  # all processes have this command line
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if is_main else None)


def add_flags(
    parser: argparse.ArgumentParser, options: type, base: object = None, title: str = "options"
) -> None:
    """A flag for each field of a dataclass.

    A field's metadata are those of ``utils.fields.setting``, and perhaps "group" (a heading of ``--help``),
    "metavar", "optional_value" (what the flag means when no value follows), "several" (values of a tuple are
    divided by blanks, and the flag may be repeated), and "may_be_none" ("none" is an empty tuple). Fields
    without "help" get no flag. Flags have no default of their own: what is not given is None in the
    Namespace, see ``take_flags``.

    Args:
        options: the dataclass.
        base: an instance whose values are shown as the defaults; without it the fields' own are.
        title: heading of the fields without a "group".
    """
    groups = {group.title: group for group in parser._action_groups}
    hints = typing.get_type_hints(options)
    for option in fields(options):
        if "help" not in option.metadata:
            continue
        heading = option.metadata.get("group", title)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = getattr(base, option.name) if base is not None else option.default
        _add_flag(groups[heading], option, hints[option.name], default)


def take_flags(options: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The values that the command line gives for the fields of a dataclass, by field name."""
    given = {x.name: getattr(namespace, x.name) for x in fields(options) if "help" in x.metadata}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in given.items() if x is not None}


def parse_options(options: type[Options], description: str | None, argv: list[str] | None = None) -> Options:
    """A dataclass of which each field is a flag, from ``argv`` (default: the process's).

    Mistakes, a ``UsageError`` of the dataclass among them, end the process with one line and status 2.
    """
    parser = Parser(description)
    add_flags(parser, options)
    try:
        return options(**take_flags(options, parser.parse_args(argv)))
    except UsageError as error:
        parser.error(str(error))


def format_value(value: object) -> str:
    """A value as a flag takes it."""
    return ",".join(map(str, value)) or NONE if isinstance(value, tuple) else str(value)


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def _add_flag(group: argparse._ArgumentGroup, option: "Field[Any]", hint: Any, default: object) -> None:
    metadata = option.metadata
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    settings: dict[str, Any] = {"dest": option.name, "default": None}
    required = option.default is MISSING and option.default_factory is MISSING and default is MISSING
    settings["required"] = required
    if hint is bool:
        settings |= {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        settings["type"] = _parser_of(hint, metadata)
        if option.default == () or metadata.get("may_be_none"):
            settings["type"] = _or_none(settings["type"])
        settings["metavar"] = metadata.get("metavar")
    if (choices := choices_of(option)) is not None:
        settings |= {"choices": choices, "metavar": None}
    if metadata.get("several"):
        kind = _parser_of(typing.get_args(hint)[0], metadata)
        settings |= {"type": kind, "nargs": "+", "action": "extend"}
    if "optional_value" in metadata:
        settings |= {"nargs": "?", "const": metadata["optional_value"]}
    text = format_value(default)
    shown = "" if required or default is None or text == "" else f" (default: {text})"
    settings["help"] = (metadata["help"] + shown).replace("%", "%%")
    group.add_argument(flag_of(option.name), *metadata.get("flags", ()), **settings)


def _parser_of(hint: Any, metadata: Mapping[str, Any]) -> Callable[[str], Any]:
    """What turns a flag's text into a value of the field's type."""
    if hint in (int, float):
        least, exclusive = metadata.get("min", -float("inf")), False
        if "exclusive_min" in metadata:
            least, exclusive = metadata["exclusive_min"], True
        return number(hint, least, metadata.get("max", float("inf")), exclusive)
    if typing.get_origin(hint) is tuple:
        kind, *rest = typing.get_args(hint)
        if kind is int and rest == [int]:
            return size
        return _tuple_of(_parser_of(kind, metadata))
    return typing.cast(Callable[[str], Any], hint)


def _tuple_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(parse(part) for part in text.split(","))

    return parse_all


def _or_none(parse: Callable[[str], tuple[Any, ...]]) -> Callable[[str], tuple[Any, ...]]:
    def parse_or_none(text: str) -> tuple[Any, ...]:
        return () if text == NONE else parse(text)

    return parse_or_none


def boolean(text: str) -> bool:
    """1, true, yes, on and their opposites, as users of the reference write them."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def number(
    kind: type, least: float, most: float = float("inf"), exclusive: bool = False
) -> Callable[[str], float]:
    """An argument type: an int or float from ``least`` (``exclusive``: above it) to ``most``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = least < value <= most if exclusive else least <= value <= most
        if not inside or value in (float("inf"), -float("inf")):
            bounds = f" {'above' if exclusive else 'at least'} {least}" if least > -float("inf") else ""
            bounds += "" if most == float("inf") else f"{' and' * bool(bounds)} at most {most}"
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {word}{bounds}, got {text!r}")
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """HEIGHT,WIDTH in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHT,WIDTH, got {text!r}") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected a positive height and width, got {text!r}")
    if max(height, width) > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"expected a height and width of at most {MAX_SIDE}, got {text!r}")
    return height, width


def run_script(main: Callable[[], None], program: str | None = None) -> None:
    """Run a script; a user's mistake ends it with one line, which begins with the program's name.

    An exception with an ``exit_status`` is such a mistake: 2 for the command line, 1 for data. An OSError or
    a MemoryError is one too. Of several processes each prints its own, unless another one did already.
    """
    program, rank = program or Path(sys.argv[0]).name, os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"process {rank}: "
    status = 0
    if signal.getsignal(signal.SIGINT) is startup.interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        # Freeing all that a run holds takes a moment, in which a further Ctrl-C has nothing to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{program}: interrupted", file=sys.stderr)  # below a progress bar
        status = 130
    except SystemExit as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as above
        if isinstance(stop.code, str):  # as Python does
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        status = getattr(error, "exit_status", 1)
        if hasattr(error, "exit_status") or isinstance(error, OSError | MemoryError):
            if str(error):  # otherwise another process tells
                print(f"{program}: error: {where}{error}", file=sys.stderr)
            elif isinstance(error, MemoryError):
                print(f"{program}: error: {where}out of memory", file=sys.stderr)
        elif is_out_of_memory(error):
            print(
                f"{program}: error: {where}out of memory; use smaller batches, tiles or images",
                file=sys.stderr,
            )
        elif world_size() == 1:
            raise
        else:
            traceback.print_exc()
    if status or world_size() > 1:
        exit_process(status)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def default_workers() -> int:
    """Data workers for each process: a share of the cores, 1 to 8."""
    return max(1, min(8, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
