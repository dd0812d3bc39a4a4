"""Reading and writing beside the network."""

import time

import pytest

from evaluation.pipeline import Background


def test_an_error_cancels_the_calls_that_wait():
    done = []

    def work():
        with Background() as writer:
            writer.run(time.sleep, 0.3)
            writer.run(done.append, 1)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert not done


def test_the_first_error_of_a_call_is_raised_at_the_end():
    def fail():
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Background() as writer:
        writer.run(fail)
