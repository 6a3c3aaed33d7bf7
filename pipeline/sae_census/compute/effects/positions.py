"""Where an edit acts: which tokens of the forwards that run, and what leaves the others out.

The tokens of a row are counted from its first real one, through the prompt and what is generated from a cache.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from sae_census.compute.census import masks
from sae_census.errors import ArgumentError

Which = Literal["all", "counted", "prompt", "generated", "ranges"]
PATTERN = r"^(all|counted|prompt|generated|[0-9]+:[0-9]*(,[0-9]+:[0-9]*)*)$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Tokens that may be edited."""

    which: Which = "all"
    """all, padding included; counted: all but what the other fields and attention sinks leave out; prompt, generated:
    before and after the end of the prompt; ranges: those of `ranges`."""
    ranges: tuple[tuple[int, int | None], ...] = ()
    """First position, and one past the last; None: to the end."""
    special_ids: tuple[int, ...] = ()
    """Token ids that do not count."""
    first_positions: int = 0
    """So many positions at the start of a row do not count,"""
    positions: tuple[int, ...] = ()
    """nor do these,"""
    max_norm_ratio: float | None = None
    """nor tokens with more than so many times the median norm of their row."""
    num_prompt: int | None = None
    """Tokens of the prompt; None: those of the forward that the others go on from."""


def read_positions(given: Any) -> Positions:
    """all, counted, prompt, generated, or ranges such as 3:10 or 0:1,5: (the end left out, as in Python).

    Raises:
        ArgumentError: if it is something else.
    """
    if isinstance(given, Positions):
        return given
    if not isinstance(given, str) or not re.match(PATTERN, given):
        raise ArgumentError(f"positions is {given!r}; expected all, counted, prompt, generated, or ranges such as 3:10")
    if ":" not in given:
        which: Which = given  # type: ignore[assignment]  # the pattern admits no other
        return Positions(which=which)
    ends = [part.split(":") for part in given.split(",")]
    ranges = tuple((int(start), int(stop) if stop else None) for start, stop in ends)
    if empty := [
        part for part, (start, stop) in zip(given.split(","), ranges, strict=True) if stop in range(start + 1)
    ]:
        raise ArgumentError(f"positions names {empty[0]}, which is empty; expected a start below its end")
    return Positions(which="ranges", ranges=ranges)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """The tokens of one forward (B, T)."""

    past: int
    """Tokens in the cache before them, padding included."""
    ids: Int64[Tensor, "B T"] | None
    """None if the caller gave embeddings."""
    attention_mask: Tensor | None = None
    """(B, past + T), if there is padding."""
    position_ids: Tensor | None = None

    def places(self, num_rows: int, num_positions: int) -> tuple[Int64[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Of every token its position in its row, and whether it is real."""
        shape, mask = (num_rows, num_positions), self.attention_mask
        if mask is not None and mask.ndim == 2 and mask.shape[0] == num_rows and mask.shape[1] >= num_positions:
            real = mask.cpu().numpy() != 0
            place = np.cumsum(real, axis=1) - 1
            return place[:, -num_positions:], real[:, -num_positions:]
        known = self.position_ids
        if known is not None and known.ndim == 2 and known.shape[1] == num_positions:
            return np.broadcast_to(known.cpu().numpy(), shape), np.ones(shape, bool)
        return np.broadcast_to(np.arange(self.past, self.past + num_positions), shape), np.ones(shape, bool)


class Chosen(NamedTuple):
    """What `Selector.choose` says about the tokens (B, T) at a hook point."""

    where: Bool[Tensor, "B T"]
    """Tokens that may be edited, on the device of the activations."""
    sinks: Bool[np.ndarray, "B T"]
    """Attention sinks, chosen or not."""


class _Seen(NamedTuple):
    """Norms of the tokens of all rows, from `start` on."""

    start: int
    norm: Float64[np.ndarray, "B S"]
    real: Bool[np.ndarray, "B S"]


class Selector:
    """Follows the forwards of a model and says which of their tokens an edit may touch.

    Whether a token is an attention sink, or longer than `max_norm_ratio`, is asked of the median norm over the tokens
    of its row that were seen up to the end of its forward: for a prompt the whole prompt; for a generated token the
    prompt and all that was generated since, itself included.
    """

    def __init__(self, positions: Positions):
        """Start; nothing was seen yet."""
        self._positions = positions
        self.left_out: dict[str, Counter[str]] = {}
        """By hook point: tokens that were left out, by the rule that did (`masks.RULES`)."""
        self._passing = Passing(past=0, ids=None)
        self._num_prompt: Int64[np.ndarray, " B"] | None = None
        self._seen: dict[str, _Seen] = {}

    @property
    def follows_rows(self) -> bool:
        """Whether what it chooses depends on what a row held before."""
        return self._positions.which != "all"

    def begin(self, passing: Passing) -> None:
        """A forward begins."""
        before, self._passing = self._passing, passing
        if passing.past == 0 and not _is_one_longer(passing.ids, before.ids):
            self._num_prompt = None

    def choose(self, name: str, x: Float[Tensor, "B T D"]) -> Chosen:
        """Which tokens at a hook point of this forward may be edited.

        Raises:
            ArgumentError: if special tokens are to be left out and the model was given embeddings.
        """
        chosen, passing = self._positions, self._passing
        place, real = passing.places(*x.shape[:2])
        norm, peak = masks.sizes(x.detach())
        sinks, outliers = self._long(name, norm, peak, real)
        if self._num_prompt is None:
            self._num_prompt = place.max(axis=1, where=real, initial=-1) + 1 if passing.past == 0 else place[:, 0]
        where = np.ones(real.shape, bool)
        if chosen.which == "counted":
            where, rules = self._counted(place, real, sinks, outliers)
        elif chosen.which != "all":
            where = self._asked(place) & real
            rules = np.where(real, masks.RULES.index("positions"), masks.RULES.index("padding"))
        if not where.all():
            books = np.bincount(rules[~where], minlength=len(masks.RULES))
            self.left_out.setdefault(name, Counter()).update(
                {rule: int(n) for rule, n in zip(masks.RULES, books, strict=True) if n}
            )
        return Chosen(torch.from_numpy(where).to(x.device), sinks)

    def first_place(self, tokens: Bool[np.ndarray, "B T"]) -> int:
        """The position in its row of the first of some tokens of this forward."""
        return int(self._passing.places(*tokens.shape)[0][tokens][0])

    def _asked(self, place: Int64[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
        if self._positions.which == "ranges":
            ends = [(start, np.inf if stop is None else stop) for start, stop in self._positions.ranges]
            return np.asarray(np.any([(place >= start) & (place < stop) for start, stop in ends], axis=0))
        given = self._positions.num_prompt
        num_prompt = self._num_prompt[:, None] if given is None and self._num_prompt is not None else given
        is_prompt: np.ndarray = place < num_prompt
        return is_prompt if self._positions.which == "prompt" else ~is_prompt

    def _counted(
        self,
        place: Int64[np.ndarray, "B T"],
        real: Bool[np.ndarray, "B T"],
        sinks: Bool[np.ndarray, "B T"],
        outliers: Bool[np.ndarray, "B T"],
    ) -> tuple[Bool[np.ndarray, "B T"], Int64[np.ndarray, "B T"]]:
        chosen, ids = self._positions, self._passing.ids
        if chosen.special_ids and ids is None:
            raise ArgumentError(
                "positions=counted leaves special tokens out, and the model was given embeddings instead of input_ids; "
                "use other positions, or Positions(which='counted') without special_ids"
            )
        excluded = {
            "padding": ~real,
            "special_tokens": np.zeros_like(real) if ids is None else np.isin(ids.cpu().numpy(), chosen.special_ids),
            "first_positions": place < chosen.first_positions,
            "positions": np.isin(place, chosen.positions),
            "max_norm_ratio": outliers,
            "attention_sinks": sinks,
        }
        rules = np.full(real.shape, masks.COUNTED)
        for rule in reversed(masks.RULES):
            rules[excluded[rule]] = masks.RULES.index(rule)
        return rules == masks.COUNTED, rules

    def _long(
        self,
        name: str,
        norm: Float64[np.ndarray, "B T"],
        peak: Float64[np.ndarray, "B T"],
        real: Bool[np.ndarray, "B T"],
    ) -> tuple[Bool[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Attention sinks, and what exceeds `max_norm_ratio`, among the tokens of this forward."""
        past, num_new = self._passing.past, norm.shape[1]
        seen = self._seen.get(name)
        start, before, was_real = past, norm[:, :0], real[:, :0]
        if seen is not None and past > seen.start and len(seen.norm) == len(norm):
            keep = past - seen.start  # less than there is if tokens were taken back from the cache
            start, before, was_real = seen.start, seen.norm[:, :keep], seen.real[:, :keep]
        whole = _Seen(start, np.concatenate([before, norm], axis=1), np.concatenate([was_real, real], axis=1))
        self._seen[name] = whole
        peaks = np.concatenate([np.zeros_like(before), peak], axis=1)
        sinks = masks.attention_sinks(whole.norm, peaks, whole.real)[:, -num_new:]
        ratio = self._positions.max_norm_ratio
        outliers = np.zeros_like(sinks) if ratio is None else masks.longer(whole.norm, whole.real, ratio)[:, -num_new:]
        return sinks, outliers


def _is_one_longer(ids: Tensor | None, before: Tensor | None) -> bool:
    """Whether a forward goes on without a cache: the same tokens and one more."""
    return (
        ids is not None
        and before is not None
        and ids.shape == (before.shape[0], before.shape[1] + 1)
        and torch.equal(ids[:, :-1], before)
    )
