import pytest

from training.schedule import poly


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.01), (30000, 0.01 * 0.5**0.9), (59999, 0.01 * (1 / 60000) ** 0.9), (60000, 0)],
)
def test_poly(step, expected):
    assert poly(0.01, step, 60000, 0.9) == pytest.approx(expected, rel=1e-9)


def test_there_is_no_rate_beyond_the_end():
    assert poly(0.01, 60001, 60000) == 0
