"""Weights that keep results exact: a weight is a whole number of copies."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def copies(value: Value, number: int, merge: Callable[[Value, Value], Value]) -> Value:
    """A value merged with itself until there are `number` of it, in O(log number) merges.

    Args:
        value: of a commutative monoid.
        number: at least 1.
        merge: of the monoid.

    Raises:
        ValueError: if the number is less than 1.
    """
    if number < 1:
        raise ValueError(f"cannot take {number} copies; expected at least one")
    result, doubled = None, value
    while True:
        if number & 1:
            result = doubled if result is None else merge(result, doubled)
        number >>= 1
        if not number:
            assert result is not None
            return result
        doubled = merge(doubled, doubled)


def normal(weights: Mapping[str, int], names: list[str]) -> dict[str, int]:
    """The weights of all names in lowest terms, 1 where none is said; empty if all are equal."""
    every = {name: weights.get(name, 1) for name in sorted(names)}
    divisor = math.gcd(*every.values())
    return {name: number // divisor for name, number in every.items()} if len(set(every.values())) > 1 else {}
