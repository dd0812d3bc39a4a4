"""Command lines: types of arguments, and one clear line for whatever is wrong."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers mistakes with one line and exit status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


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
