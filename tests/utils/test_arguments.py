"""Argument types and the one line that a user's mistake is answered with."""

import argparse
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.arguments import Parser, UsageError, add_flags, boolean, number, run_script, size, take_flags
from utils.fields import setting

positive_int, count = number(int, 1), number(int, 0)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("True", True), ("0", False), ("no", False)])
def test_boolean(text, value):
    assert boolean(text) is value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (boolean, "maybe", "expected true or false, got 'maybe'"),
        (positive_int, "0", "expected a whole number at least 1, got '0'"),
        (positive_int, "2.5", "whole number"),
        (count, "-1", "at least 0"),
        (number(float, 0, exclusive=True), "0", "expected a number above 0"),
        (number(float, 0, 1), "1.5", "at least 0 and at most 1"),
        (number(float, 0), "nan", "expected a number"),
        (number(float, 0), "inf", "expected a number"),
        (size, "769", "expected HEIGHT,WIDTH, got '769'"),
        (size, "1,2,3", "HEIGHT,WIDTH"),
        (size, "0,769", "positive height and width"),
        (size, "-5,5", "positive"),
        (size, "99999,5", "at most 32768"),
    ],
)
def test_values_that_make_no_sense(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


@dataclass(frozen=True)
class Options:
    """One field of each kind."""

    sides: tuple[int, int] = setting((3, 4), "a size", group="first")
    scales: tuple[float, ...] = setting((1.0,), "several numbers, 100 %", exclusive_min=0, max=8)
    lengths: tuple[int, ...] = setting((), "several numbers or none", min=1)
    rate: float = setting(0.1, "a number", min=0, flags=("--lr",))
    count: int | None = setting(None, "a whole number or none", min=1)
    name: str = setting("b", "a choice", choices=lambda: ("a", "b"))
    switch: bool = setting(False, "on or off")
    folder: Path = setting(Path("x"), "a path")
    resume: str | None = setting(None, "with or without a value", optional_value="")
    hidden: int = 7


def parsed(*arguments):
    parser = Parser("what it does")
    add_flags(parser, Options)
    return take_flags(Options, parser.parse_args(arguments))


def test_only_the_flags_that_are_given_count():
    assert parsed() == {}
    assert parsed("--sides", "5,6", "--scales", "0.75,1", "--lr", "2", "--count", "3", "--name", "a") == {
        "sides": (5, 6), "scales": (0.75, 1.0), "rate": 2.0, "count": 3, "name": "a"
    }  # fmt: skip
    assert parsed("--switch", "--folder", "a/b", "--resume") == {
        "switch": True, "folder": Path("a/b"), "resume": ""
    }  # fmt: skip
    assert parsed("--lengths", "none") == {"lengths": ()}
    assert parsed("--lengths", "5") == {"lengths": (5,)}
    assert parsed("--switch", "no", "--resume", "x") == {"switch": False, "resume": "x"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scales", "0.5,0"), "--scales: expected a number above 0 and at most 8, got '0'"),
        (("--scales", "1,,2"), "expected a number"),
        (("--scales", "none"), "expected a number"),  # it has a default that is not empty
        (("--lr", "-1"), "--rate/--lr: expected a number at least 0, got '-1'"),
        (("--count", "0"), "whole number at least 1"),
        (("--name", "c"), "invalid choice: 'c'"),
        (("--hidden", "1"), "unrecognized arguments"),
    ],
)
def test_bounds_and_choices_stand_with_the_field(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_and_groups(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "first:\n  --sides SIDES" in shown
    assert "a size (default: 3,4)" in shown
    assert "several numbers, 100 % (default: 1.0)" in shown
    assert "a whole number or none\n" in shown


def test_a_wrong_command_line_is_one_line_and_status_2(capsys):
    parser = Parser("what it does")
    parser.add_argument("--size", type=size)
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--size", "5"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--size: expected HEIGHT,WIDTH, got '5' (see --help)" in error


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (UsageError("usage"), 2),
        (OSError("data"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit("a text"), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1),
    ],
)
def test_users_mistakes_end_a_script_without_a_traceback(raised, status, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == status
    told = capsys.readouterr().err.strip()
    assert told
    assert told.count("\n") == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_a_script_lets_go_of_what_it_holds_is_ignored(stop):
    handlers = []

    class Held:
        def __del__(self):
            handlers.append(signal.getsignal(signal.SIGINT))

    def main():
        held = Held()  # noqa: F841
        raise stop(130)

    with pytest.raises(SystemExit):
        run_script(main)
    assert handlers == [signal.SIG_IGN]


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
