"""Which sequence a forward goes on with, read off the cache that its first block receives.

Callers enter a model anywhere (its head, a wrapper around it, the module that owns the blocks), but every one of them
hands the blocks the cache. What was collected of the tokens in a cache is noted on the cache, and goes along when it is
copied, so a prompt's cache may be continued in several ways and in any order.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sae_census.compute.effects.tracks import Track
from sae_census.errors import ArgumentError

_NOTE = "_sae_census_tracks"
_LENGTHS = ("get_seq_length", "get_pos")
"""How caches of transformers, and nanochat's, say how many tokens were written to them."""
_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past", "kv_cache")


class Past(NamedTuple):
    """Where a forward begins."""

    cache: Any
    """None if there is none."""
    num_tokens: int
    """Tokens that it holds."""


def past_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Past:
    """The cache among the arguments of a block, before the block writes to it.

    Raises:
        ArgumentError: if there is one that does not say how many tokens it holds.
    """
    for value in (*args, *kwargs.values()):
        length = cached_tokens(value)
        if length is not None:
            return Past(value, length)
    for name in _NAMES:
        if kwargs.get(name) is not None:
            raise ArgumentError(
                f"the {name} of this forward is a {type(kwargs[name]).__name__}, which does not say how many tokens it "
                "holds; use a Cache of transformers, or use_cache=False"
            )
    return Past(None, 0)


def cached_tokens(cache: Any) -> int | None:
    """Tokens written to a cache; None for anything else."""
    for name in _LENGTHS:
        length = getattr(cache, name, None)
        if callable(length):
            try:
                return int(length())
            except ValueError as error:  # transformers, of a cache whose layers keep no tokens
                raise ArgumentError(
                    f"a {type(cache).__name__} of this model does not say how many tokens it holds ({error}); use "
                    "use_cache=False"
                ) from error
    return None


class Sequences:
    """The codes of one tracking: of the sequence that ran last, and of those whose caches are alive."""

    def __init__(self) -> None:
        self._tracks: dict[str, Track] = {}
        self._cache: Any = None

    def begin(self, past: Past) -> None:
        """A forward begins: it goes on with the sequence in its cache, or starts a new one.

        Raises:
            ArgumentError: if the cache holds tokens between those that were followed and this forward's.
        """
        if past.num_tokens == 0:
            self._tracks = {}
        elif (noted := _noted(past.cache, self)) is not None:
            self._tracks = noted
        elif not hasattr(past.cache, "crop") and _ends(self._tracks) == {past.num_tokens}:
            # nanochat fills the cache of its samples from that of the prompt, and drops that
            self._tracks = {name: track.copy() for name, track in self._tracks.items()}
        else:
            self._tracks = {}  # what is in the cache was computed before
        for name, track in list(self._tracks.items()):
            if past.num_tokens <= track.first:
                del self._tracks[name]
            elif past.num_tokens > track.end:
                raise ArgumentError(
                    f"this forward goes on after {past.num_tokens} tokens, of which only {track.end} were followed at "
                    f"{name}; run all forwards of one cache inside the same block"
                )
        self._cache = past.cache
        _note(past.cache, self, self._tracks)

    def track(self, name: str, num_features: int, past: Past) -> Track:
        """Where the codes of a hook point go in the forward that runs."""
        if name not in self._tracks:
            self._tracks[name] = Track(num_features=num_features, first=past.num_tokens)
        return self._tracks[name]

    def read(self) -> dict[str, Track]:
        """What is collected of the sequence that ran last: of the tokens that its cache holds now.

        Assisted decoding takes back tokens that it had tried, after the last forward too.
        """
        if hasattr(self._cache, "crop") and (length := cached_tokens(self._cache)):
            for track in self._tracks.values():
                track.cut(length)
        return self._tracks

    def close(self) -> None:
        """Nothing goes on: let the cache go, which may be large."""
        self.read()
        self._cache = None

    def clear(self) -> None:
        """Forget all codes."""
        _note(self._cache, self, {})
        self._tracks, self._cache = {}, None


class _Noted:
    """The tracks of the tokens in one cache, by who follows them; a copy of the cache gets copies of them."""

    def __init__(self) -> None:
        self.tracks: WeakKeyDictionary[Sequences, dict[str, Track]] = WeakKeyDictionary()

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Noted":
        new = _Noted()
        for owner, tracks in self.tracks.items():
            new.tracks[owner] = {name: track.copy() for name, track in tracks.items()}
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _Noted, ()


def _noted(cache: Any, owner: Sequences) -> dict[str, Track] | None:
    noted = getattr(cache, _NOTE, None)
    return noted.tracks.get(owner) if isinstance(noted, _Noted) else None


def _note(cache: Any, owner: Sequences, tracks: dict[str, Track]) -> None:
    if cache is None:
        return
    with suppress(AttributeError):  # of a cache with slots, which cannot be told from a copy of itself
        if not isinstance(getattr(cache, _NOTE, None), _Noted):
            setattr(cache, _NOTE, _Noted())
        getattr(cache, _NOTE).tracks[owner] = tracks


def _ends(tracks: Mapping[str, Track]) -> set[int]:
    return {track.end for track in tracks.values()}
