"""Settings as frozen dataclasses whose fields carry help and bounds: checked, stored and read back by name.

A field is declared once, with ``setting(default, help, …)``. Its metadata are what a command line needs to
make a flag of it: "help", "choices", "min", "max", "exclusive_min" and "flags" (further names of the flag).
Only those that were given are there.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Settings = TypeVar("Settings")
REQUIRED: Any = dataclasses.MISSING  # in the place of a default
Choices = Iterable[Any] | Callable[[], Iterable[Any]]


class UnknownChoiceError(ValueError):
    """A name that a registry does not hold, to which a module of the user's may add it."""


def setting(
    default: Any,
    help: str,
    *,
    choices: Choices | None = None,
    min: float | None = None,
    max: float | None = None,
    exclusive_min: float | None = None,
    flags: tuple[str, ...] = (),
    **others: Any,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: its value where nothing is given; ``REQUIRED``: it must be given.
        help: one sentence, also the flag's help text.
        choices: the values allowed; a registry or a function, so that later entries count.
        min, max: bounds that are allowed themselves; of a tuple, for each of its numbers.
        exclusive_min: a bound that is not allowed itself.
        flags: further names of the flag, as ``("--ft",)``.
        others: further metadata, for whoever reads them.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "min": min,
        "max": max,
        "exclusive_min": exclusive_min,
        "flags": flags or None,
        **others,
    }
    present = {name: value for name, value in metadata.items() if value is not None}
    return dataclasses.field(default=default, metadata=present)


def choices_of(field: "dataclasses.Field[Any]") -> tuple[Any, ...] | None:
    """The values that a field may have at this moment; None: it has no list of them."""
    choices = field.metadata.get("choices")
    if choices is None:
        return None
    return tuple(choices() if callable(choices) else choices)


def check_fields(settings: Any) -> None:
    """Check the types, choices and bounds of all fields; to be called from ``__post_init__``.

    Raises:
        ValueError: one line with the field, its value and what was expected.
        UnknownChoiceError: (one of them) a name that a registry does not hold.
    """
    kinds = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        check_value(field, kinds[field.name], getattr(settings, field.name))


def check_value(field: "dataclasses.Field[Any]", kind: Any, value: Any) -> None:
    """Check one value of a field, as ``check_fields`` does; ``kind``: the field's type."""
    choices = choices_of(field)
    if choices is not None and value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        error = ValueError if isinstance(field.metadata["choices"], tuple) else UnknownChoiceError
        raise error(f"{field.name} must be one of {known}; got {value!r}")
    if not _has_type(value, kind):
        raise ValueError(f"{field.name} must be {_describe(kind)}; got {value!r}")
    for number in value if isinstance(value, tuple) else (value,):
        if (
            isinstance(number, (int, float))
            and not isinstance(number, bool)
            and not _is_inside(field, number)
        ):
            raise ValueError(f"{field.name} must be {describe_bounds(field)}; got {value!r}")


def describe_bounds(field: "dataclasses.Field[Any]") -> str:
    """The bounds of a field in words, as "at least 1 and at most 255"; empty if there are none."""
    words = (("exclusive_min", "above"), ("min", "at least"), ("max", "at most"))
    return " and ".join(f"{word} {field.metadata[key]}" for key, word in words if key in field.metadata)


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain values by name, which a checkpoint or JSON can hold; settings within them become dicts too."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: to_dict(x) if dataclasses.is_dataclass(x) else x for name, x in values.items()}


def from_dict(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """What ``to_dict`` returned, also after JSON, which knows no tuples. Missing fields have their default.

    Raises:
        ValueError: unknown names, values of a wrong type or out of bounds.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} is made from a dict; got {type(values).__name__}")
    kinds = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [str(name) for name in values if name not in names]
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return cls(**{name: _from_plain(kinds[name], value) for name, value in values.items()})


def _from_plain(kind: Any, value: Any) -> Any:
    for member in _members(kind):
        if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
            return from_dict(typing.cast(type, member), value)
        if typing.get_origin(member) is tuple and isinstance(value, list):
            return tuple(value)
    return value


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _has_type(value: Any, kind: Any) -> bool:
    members = _members(kind)
    if len(members) > 1:
        return any(_has_type(value, member) for member in members)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(_has_type(x, kinds[0]) for x in value)
        return len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if kind in (int, float):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        return is_int or (kind is float and isinstance(value, float) and math.isfinite(value))
    return not isinstance(kind, type) or isinstance(value, kind)


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names that have other values, as "name before → now"; both have the same names."""
    return [f"{name} {value} → {now[name]}" for name, value in before.items() if now[name] != value]


def _describe(kind: Any) -> str:
    members = _members(kind)
    if len(members) > 1:
        return " or ".join(_describe(member) for member in members)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return f"a tuple, each entry {_describe(kinds[0])}"
        return f"{len(kinds)} values, each {_describe(kinds[0])}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    words[types.NoneType] = "None"
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _is_inside(field: "dataclasses.Field[Any]", number: float) -> bool:
    bounds = field.metadata
    return (
        number >= bounds.get("min", -math.inf)
        and number <= bounds.get("max", math.inf)
        and number > bounds.get("exclusive_min", -math.inf)
    )
