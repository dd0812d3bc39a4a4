"""Argument types and the one line that a user's mistake is answered with."""

import argparse
import signal

import pytest

from utils.arguments import Parser, boolean, count, exit_on, number, positive_int, scales, size


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
        (scales, "0.5,0", "above 0"),
        (scales, "1,,2", "expected a number"),
    ],
)
def test_values_that_make_no_sense(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


def test_sizes_and_scales():
    assert size("360,480") == (360, 480)
    assert scales("0.75,1,1.25") == (0.75, 1.0, 1.25)


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
    ("raised", "status"), [(KeyError("usage"), 2), (OSError("data"), 1), (KeyboardInterrupt(), 130)]
)
def test_users_mistakes_end_a_script_without_a_traceback(raised, status, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as caught:
        exit_on(main, usage=(KeyError,), data=(OSError,))
    assert caught.value.code == status
    assert capsys.readouterr().err.strip().count("\n") == 0


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
        exit_on(main, usage=(), data=())
    assert handlers == [signal.SIG_IGN]


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_on(lambda: 1 / 0, usage=(KeyError,), data=(OSError,))
