"""Command lines: types of arguments, and one clear line for whatever is wrong."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers mistakes with one line and exit status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        speaks = os.environ.get("RANK", "0") == "0"  # of several processes, which all have this command line
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n" if speaks else None)


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
        if not inside or value == float("inf"):
            bounds = f"{'above' if exclusive else 'at least'} {least:g}"
            bounds += "" if most == float("inf") else f" and at most {most:g}"
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {word} {bounds}, got {text!r}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}


def size(text: str) -> tuple[int, int]:
    """HEIGHT,WIDTH in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHT,WIDTH, got {text!r}") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected a positive height and width, got {text!r}")
    return height, width


def scales(text: str) -> tuple[float, ...]:
    """Factors separated by commas."""
    return tuple(number(float, 0, 8, exclusive=True)(part) for part in text.split(","))


def add_data_arguments(
    parser: argparse.ArgumentParser, datasets: Sequence[str], split: str
) -> argparse._ArgumentGroup:
    """The flags that say which images and labels are meant; ``split`` is the default one."""
    workers = min(8, len(os.sched_getaffinity(0)))
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, required=True, help="the data set's folder")
    data.add_argument("--dataset", choices=datasets, help="which data set; guessed from the folder's layout")
    data.add_argument("--data-list", type=Path, help="file of 'image label' lines relative to --data-dir")
    data.add_argument("--split", default=split, help="the data set's own split, without --data-list")
    data.add_argument("--num-classes", type=number(int, 1, 255), help="needed for --dataset list")
    data.add_argument(
        "--ignore-label", type=number(int, 0, 255), default=255, help="label that does not count"
    )
    data.add_argument("--num-workers", type=count, default=workers, help="processes that read the data")
    return data


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What the flags of ``add_data_arguments`` must fulfil together."""
    if args.dataset == "list" and (args.num_classes is None or args.data_list is None):
        parser.error("--dataset list needs --data-list and --num-classes")


def exit_on(
    main: Callable[[], None],
    usage: tuple[type[Exception], ...],
    data: tuple[type[Exception], ...],
) -> None:
    """Run a script; its users' mistakes end it with one line and status 2 (usage) or 1 (data)."""
    program = sys.argv[0].rsplit("/", 1)[-1]
    try:
        main()
    except usage as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except data as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
