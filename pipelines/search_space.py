"""What a sweep varies: fields of the config, each with the values it may take, checked before anything runs.

    train.learning-rate=log:1e-4..1e-2    vqvae.quantizer.num-codes=choice:256,512,1024

A field is named as on the command line, without the dashes in front. `log` and `uniform` draw a number between two (for
a field of whole numbers a whole one, both ends included), `choice` one of a list.
"""

import dataclasses
import math
import random
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipelines.config import PipelineConfig
from vqvae_core.errors import InputError

Kind = Literal["log", "uniform", "choice"]
Value = float | int | bool | str | None
_EXAMPLE = "such as train.learning-rate=log:1e-4..1e-2 or vqvae.quantizer.num-codes=choice:256,512"
_NOT_SEARCHED = ("resources", "data")  # where it is computed, and on what


@dataclass(frozen=True)
class Dimension:
    """One field and its values. low, high: of log and uniform; values: of choice."""

    field: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    values: tuple[Value, ...] = ()

    def draw(self, generator: random.Random) -> Value:
        """A value at random."""
        if self.kind == "choice":
            return generator.choice(self.values)
        if self.kind == "uniform" and self.whole:
            return generator.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return generator.uniform(self.low, self.high)
        high = self.high + 1 if self.whole else self.high  # a whole number stands for what lies up to the next one
        found = math.exp(generator.uniform(math.log(self.low), math.log(high)))
        return min(int(found), int(self.high)) if self.whole else min(max(found, self.low), self.high)

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Values that the config is tried with before a sweep begins."""
        if self.kind == "choice":
            return self.values
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


def parse(text: str, config: PipelineConfig) -> Dimension:
    """A dimension from `FIELD=KIND:VALUES`. Raises `InputError` where there is no such field, where a value is not of
    its type, or where the config refuses it."""
    field, equals, rest = text.partition("=")
    kind, colon, values = rest.partition(":")
    field = field.lstrip("-").replace("-", "_")
    if not equals or not colon or kind not in get_args(Kind):
        raise InputError(
            f"expected FIELD=log:LOW..HIGH, FIELD=uniform:LOW..HIGH or FIELD=choice:A,B, found {text!r}; {_EXAMPLE}"
        )
    hint = _type_of(field, config)
    found = _choice(field, values, hint) if kind == "choice" else _range(field, kind, values, hint)  # type: ignore[arg-type]
    for value in found.extremes:
        with_values(config, {field: value})
    return found


def parse_all(texts: list[str], config: PipelineConfig) -> list[Dimension]:
    """All dimensions of a sweep, each field once."""
    found = [parse(text, config) for text in texts]
    fields = [dimension.field for dimension in found]
    for field in fields:
        if fields.count(field) > 1:
            count = fields.count(field)
            raise InputError(f"expected each field once in a search space, found {_shown(field)} {count} times")
    if not found:
        raise InputError(f"expected at least one field to search over, found none; {_EXAMPLE}")
    return found


def with_fields(config: PipelineConfig, texts: Sequence[str]) -> PipelineConfig:
    """The config with other values in some fields, from `FIELD=VALUE` each. Raises `InputError` as `parse` does."""
    for text in texts:
        field, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"expected FIELD=VALUE, such as train.learning-rate=1e-3, found {text!r}")
        field = field.lstrip("-").replace("-", "_")
        config = with_values(config, {field: _value(field, value, _type_of(field, config))})
    return config


def with_values(config: PipelineConfig, values: dict[str, Value]) -> PipelineConfig:
    """The config with other values in some fields, by dotted names. Raises `InputError` where it refuses them."""
    for field, value in values.items():
        try:
            config = _replaced(config, field.split("."), value)
        except (ValueError, TypeError) as error:
            name = _shown(field)
            raise InputError(f"expected values that the config takes, found {value!r} for {name}: {error}") from error
    return config


def _replaced(config: Any, path: list[str], value: Value) -> Any:
    first, *rest = path
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def _type_of(field: str, config: PipelineConfig) -> Any:
    """The declared type of a field. Raises `InputError` where there is none, or none that a sweep may vary."""
    place: Any = config
    path = field.split(".")
    for number, name in enumerate(path):
        names = [item.name for item in dataclasses.fields(place)] if dataclasses.is_dataclass(place) else []
        if name not in names:
            above = ".".join(path[:number])
            raise InputError(
                f"expected a field of the config, found {_shown(field)}; {_shown(above) if above else 'it'} has "
                f"{', '.join(one.replace('_', '-') for one in names) or 'no fields'}"
            )
        hint, place = get_type_hints(type(place))[name], getattr(place, name)
    if dataclasses.is_dataclass(place):
        raise InputError(f"expected a single field, found {_shown(field)}, which has several")
    if path[0] in _NOT_SEARCHED:
        raise InputError(f"expected a field of what is computed, found {_shown(field)}; give it once, as an option")
    return hint


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type."""
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _range(field: str, kind: Literal["log", "uniform"], text: str, hint: Any) -> Dimension:
    whole = int in _options(hint) and float not in _options(hint)
    if not whole and float not in _options(hint):
        raise InputError(f"expected a field of numbers for {kind}, found {_shown(field)}; give choice:A,B")
    low, dots, high = text.partition("..")
    try:
        ends = (int(low), int(high)) if whole else (float(low), float(high))
    except ValueError:
        ends = None
    fits = ends is not None and dots and all(map(math.isfinite, ends)) and ends[0] < ends[1]
    if ends is None or not fits or (kind == "log" and ends[0] <= 0):
        numbers = f"two {'whole ' if whole else ''}numbers LOW..HIGH, LOW below HIGH"
        above = " and above 0" if kind == "log" else ""
        raise InputError(f"expected {numbers}{above} for {_shown(field)}, found {text!r}")
    return Dimension(field, kind, *map(float, ends), whole=whole)


def _choice(field: str, text: str, hint: Any) -> Dimension:
    values = tuple(_value(field, one.strip(), hint) for one in text.split(","))
    if len(set(values)) != len(values) or len(values) < 2:
        raise InputError(f"expected two or more different values for {_shown(field)}, found {text!r}")
    return Dimension(field, "choice", values=values)


def _value(field: str, text: str, hint: Any) -> Value:
    """A value of a field's type. Raises `InputError`."""
    wanted = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            found = next((one for one in get_args(option) if str(one) == text), None)
            if found is not None:
                return found
            wanted += map(str, get_args(option))
        elif option is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            wanted += ["true", "false"]
        elif option is type(None):
            if text.lower() == "none":
                return None
            wanted.append("none")
        elif option in (int, float):
            try:
                return option(text)
            except ValueError:
                wanted.append("a whole number" if option is int else "a number")
    if not wanted:
        raise InputError(f"expected a field of single values to search over, found {_shown(field)}")
    raise InputError(f"expected {' or '.join(wanted)} for {_shown(field)}, found {text!r}")


def _shown(field: str) -> str:
    return field.replace("_", "-")
