"""Settings that check themselves and are stored as plain values."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest

from utils.fields import check_fields, choices_of, describe_bounds, from_dict, setting, to_dict

KINDS = {"plain": 1}


@dataclass(frozen=True)
class Inner:
    rounds: int = setting(2, "rounds", min=0)
    kind: str = setting("plain", "kind", choices=KINDS)

    def __post_init__(self):
        check_fields(self)


INNER = Inner()


@dataclass(frozen=True)
class Outer:
    inner: Inner = setting(INNER, "the inner settings")
    size: tuple[int, int] = setting((4, 5), "size", min=1)
    scales: tuple[float, ...] = setting((1.0,), "scales", exclusive_min=0, max=8)
    rate: float = setting(0.1, "rate", exclusive_min=0)
    mirror: bool = setting(True, "mirror", flags=("--flip",))
    name: str | None = setting(None, "name")

    def __post_init__(self):
        check_fields(self)


def test_plain_values_and_back():
    outer = Outer(Inner(3), size=(7, 8), scales=(0.5, 2), name="x")
    values = to_dict(outer)
    assert values["inner"] == {"rounds": 3, "kind": "plain"}
    assert from_dict(Outer, values) == outer
    assert from_dict(Outer, json.loads(json.dumps(values))) == outer  # lists become tuples again
    assert from_dict(Outer, {}) == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0}, "rate must be above 0; got 0"),
        ({"rate": math.nan}, "rate must be a finite number; got nan"),
        ({"rate": True}, "rate must be a finite number; got True"),
        ({"scales": (1, 0.0)}, "scales must be above 0 and at most 8; got (1, 0.0)"),
        ({"scales": (1, 8.5)}, "scales must be above 0 and at most 8"),
        ({"size": (4,)}, "size must be 2 values, each a whole number; got (4,)"),
        ({"size": 99.5}, "size must be 2 values"),
        ({"size": (0, 4)}, "size must be at least 1; got (0, 4)"),
        ({"mirror": 1}, "mirror must be true or false; got 1"),
        ({"name": 3}, "name must be a text or None; got 3"),
        ({"inner": 3}, "inner must be Inner; got 3"),
        ({"inner": {"rounds": 2.5}}, "rounds must be a whole number; got 2.5"),
        ({"inner": {"rounds": -1}}, "rounds must be at least 0; got -1"),
        ({"inner": {"kind": "fancy"}}, "kind must be one of plain; got 'fancy'"),
        ({"inner": {"kind": [1]}}, "kind must be one of plain; got [1]"),
        ({"inner": {"round": 1}}, "Inner has no field round"),
        ({"rates": 1, "nmae": 2}, "Outer has no field rates, nmae"),
        ([1], "Outer is made from a dict; got list"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole line is compared)
        from_dict(Outer, values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_choices_that_are_added_later_count(monkeypatch):
    monkeypatch.setitem(KINDS, "fancy", 2)
    assert Inner(kind="fancy").kind == "fancy"
    field = {field.name: field for field in dataclasses.fields(Inner)}["kind"]
    assert choices_of(field) == ("plain", "fancy")


def test_metadata_for_flags():
    fields = {field.name: field for field in dataclasses.fields(Outer)}
    assert fields["mirror"].metadata == {"help": "mirror", "flags": ("--flip",)}
    assert describe_bounds(fields["scales"]) == "above 0 and at most 8"
    assert describe_bounds(fields["name"]) == ""
    assert choices_of(fields["name"]) is None
