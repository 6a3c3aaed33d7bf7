"""The arrays of a partial and of a node, one by one; whoever writes or reads one goes through here.

A partial says what one shard says of one SAE. A node is the merge of several partials and lies as they do; its samples
also say of which of its shards they are. An array `x_start` says where the entries of each feature, pair or context
begin in the arrays beside it: it has one number more than there are of them, and the last is the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sae_census.errors import CorruptError
from sae_census.io.store import zarr_files

Held = Literal["always", "by nodes", "if asked for"]
"""Who has an array; codes and further silent contexts are kept if the settings ask for them."""


@dataclass(frozen=True, slots=True)
class ArrayField:
    """One array."""

    name: str
    dtype: str
    """As numpy spells it."""
    axes: tuple[str, ...]
    """Letters, equal where lengths are: F features, D the SAE's width, L codes of a token (the last: more), H bins of
    the histogram, T, R and B samples of a feature, S contexts kept for silence, N firings in them, P pairs,
    C codes of pairs, Q further silent contexts, A all codes, M documents. A number is a length; `X+1` is one more
    than X."""
    meaning: str
    held: Held = "always"


def _kept(name: str, axis: str, meaning: str) -> tuple[ArrayField, ...]:
    """The columns of a group of samples; -1 and 0 fill the places that no sample took."""
    return (
        ArrayField(f"{name}_shard", "int32", ("F", axis), "Shard of the sample: its place in the node.", "by nodes"),
        ArrayField(f"{name}_row", "int32", ("F", axis), f"Context of the sample, in its shard. {meaning}"),
        ArrayField(f"{name}_position", "int32", ("F", axis), "Token of the sample, in its context."),
        ArrayField(f"{name}_value", "float32", ("F", axis), "Code of the sample."),
    )


PARTIAL = (
    ArrayField("count", "int64", ("F",), "Tokens on which the feature fires."),
    ArrayField("context_count", "int64", ("F",), "Contexts in which it fires at least once."),
    ArrayField("total", "int64", ("F", "2"), "Sum of codes, fixed point of 2 limbs."),
    ArrayField("total_square", "int64", ("F", "2"), "Sum of squared codes, fixed point of 2 limbs."),
    ArrayField("maximum", "float32", ("F",), "Largest code; 0 if it never fires."),
    ArrayField("histogram", "int64", ("F", "H"), "Codes by size, 8 bins an octave."),
    ArrayField("document_count", "int64", ("F",), "Documents in which it fires."),
    ArrayField("document_count_square", "int64", ("F",), "Sum over documents of firings squared."),
    ArrayField("document_count_tokens", "int64", ("F",), "Sum over documents of firings times counted tokens."),
    ArrayField("document_total_square", "int64", ("F", "2"), "Sum over documents of (sum of codes) squared, 2 limbs."),
    ArrayField(
        "document_total_tokens", "int64", ("F", "2"), "Sum over documents of sum of codes times tokens, 2 limbs."
    ),
    ArrayField("l0_histogram", "int64", ("L",), "Counted tokens by how many codes they have."),
    ArrayField("fit_tokens", "int64", ("1",), "Tokens of the fit sample."),
    ArrayField("fit_error", "int64", ("1", "2"), "Squared length of what reconstruction missed there, 2 limbs."),
    ArrayField("fit_square", "int64", ("1", "2"), "Squared length of the activations there, 2 limbs."),
    ArrayField("fit_vector", "int64", ("D", "2"), "Sum of the activations there, 2 limbs."),
    *_kept("top", "T", "The strongest, each of another context."),
    *_kept("random", "R", "Chosen by hash from all firings."),
    *_kept("bands", "B", "Chosen by hash from each band of codes."),
    ArrayField("pair_start", "int64", ("F+1",), "Where the pairs of each feature begin: a feature and a kept context."),
    ArrayField("pair_shard", "int32", ("P",), "Shard of the pair's context: its place in the node.", "by nodes"),
    ArrayField("pair_row", "int32", ("P",), "The pair's context."),
    ArrayField("code_start", "int64", ("P+1",), "Where the codes of each pair begin."),
    ArrayField("code_position", "int32", ("C",), "Token of the code."),
    ArrayField("code_value", "float32", ("C",), "The code."),
    ArrayField(
        "silent_shard", "int32", ("S",), "Shard of a context kept for silence: its place in the node.", "by nodes"
    ),
    ArrayField("silent_row", "int32", ("S",), "Contexts kept for silence."),
    ArrayField("silent_start", "int64", ("S+1",), "Where the features that fire in each begin."),
    ArrayField("silent_feature", "int32", ("N",), "The features that fire there; all others are silent."),
    ArrayField("silent_more_start", "int64", ("F+1",), "Where the further silent contexts begin.", "if asked for"),
    ArrayField("silent_more_shard", "int32", ("Q",), "Shard of that context: its place in the node.", "by nodes"),
    ArrayField("silent_more_row", "int32", ("Q",), "A further context in which the feature is silent.", "if asked for"),
    ArrayField("codes_start", "int64", ("F+1",), "Where all codes of each feature begin.", "if asked for"),
    ArrayField("codes_row", "int32", ("A",), "Context of the code.", "if asked for"),
    ArrayField("codes_position", "int32", ("A",), "Token of the code.", "if asked for"),
    ArrayField("codes_value", "float32", ("A",), "The code.", "if asked for"),
    ArrayField("document_tokens", "int64", ("M",), "Counted tokens of every document of the shard.", "if asked for"),
)
_FIELDS = {field.name: field for field in PARTIAL}


def check(arrays: Mapping[str, np.ndarray], *, is_node: bool) -> None:
    """Prove that arrays are those of a partial or node.

    Raises:
        ValueError: naming the first array that is missing, not known, or of another dtype or shape.
    """
    held = {"always", "by nodes"} if is_node else {"always"}
    if missing := [field.name for field in PARTIAL if field.held in held and field.name not in arrays]:
        raise ValueError(f"the arrays lack {missing[0]}, which io.store.partials expects")
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        field = _FIELDS.get(name)
        if field is None or (field.held == "by nodes" and not is_node):
            raise ValueError(f"the array {name} is none that io.store.partials knows of a {_kind(is_node=is_node)}")
        axes = ", ".join(field.axes)
        if array.dtype != field.dtype or array.ndim != len(field.axes):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; expected {field.dtype} of ({axes})")
        for axis, length in zip(field.axes, array.shape, strict=True):
            letter, _, more = axis.partition("+")
            expected = int(letter) if letter.isdecimal() else lengths.setdefault(letter, length - int(more or 0))
            if length != expected + int(more or 0):
                raise ValueError(f"{name} has shape {array.shape}; expected ({axes}) with {letter} = {expected}")


def _kind(*, is_node: bool) -> str:
    return "node" if is_node else "partial"


def pack(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], *, is_node: bool = False) -> bytes:
    """A partial or node as bytes. Equal input gives equal bytes.

    Raises:
        ValueError: as `check`.
    """
    check(arrays, is_node=is_node)
    return zarr_files.pack({"": arrays}, attributes)


class Partial:
    """A partial or node on disk, open for reading; use with `with`."""

    def __init__(self, path: Path):
        """Open it.

        Raises:
            CorruptError: if it is none.
        """
        self._path, self._pack = path, zarr_files.Pack(path)

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self._pack.__exit__()

    def has(self, name: str) -> bool:
        """Whether it holds one of the arrays that not all hold."""
        return self._pack.has(_FIELDS[name].name)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """An array, or the half-open range of its first axis.

        Raises:
            CorruptError: if it is missing, damaged, or of another kind than `PARTIAL` says.
        """
        field = _FIELDS[name]
        array = self._pack.read(name, start, stop)
        if array.dtype != field.dtype or array.ndim != len(field.axes):
            raise CorruptError(
                f"{name} of the partial {self._path} is {array.dtype} with {array.ndim} axes; expected {field.dtype} "
                f"with {len(field.axes)}"
            )
        return array
