"""The command line: ``python -m dataset.demo OUTPUT``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dataset.demo.files import generate
from dataset.demo.scene import MIN_SIZE
from dataset.labels import DataError

MAX_SIZE = 8192  # pixels; a scene of 8192×8192 takes about 5 GB of memory


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers mistakes with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _whole_number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return parse


def _size(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and MIN_SIZE <= int(part) <= MAX_SIZE for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHT,WIDTH, both {MIN_SIZE} to {MAX_SIZE}")
    return int(parts[0]), int(parts[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m dataset.demo",
        description="Write a small synthetic data set in the layout of Cityscapes.",
    )
    positive, natural = _whole_number(1), _whole_number(0)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; new or empty")
    parser.add_argument("--train", type=positive, default=48, metavar="N", help="training scenes (48)")
    parser.add_argument("--val", type=positive, default=12, metavar="N", help="validation scenes (12)")
    parser.add_argument("--size", type=_size, default=(256, 512), metavar="HEIGHT,WIDTH", help="(256,512)")
    parser.add_argument("--seed", type=natural, default=0, metavar="S", help="other scenes (0)")
    options = parser.parse_args(arguments)
    height, width = options.size
    try:
        written = generate(options.output, options.train, options.val, height, width, options.seed)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"error: not enough memory to draw scenes of {width}×{height}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.output}: interrupted, nothing was written", file=sys.stderr)
        return 130
    scenes = f"{options.train} training and {options.val} validation scenes of {width}×{height}"
    print(f"{options.output}: {'wrote' if written else 'left alone, it already holds its'} {scenes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
