"""Compare two answers to the same prompts, of a base and a fine-tuned model say: did other features lead?

Only what both answers say enters a number: a feature that one of them does not rank has no score there, and lists are
compared at the ranks that both have.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_census.compute.numbers.drift import rank_correlation
from sae_census.errors import SourceError
from sae_census.io.store import json_lines

_SIZES = (5, 10, 25, 100)
_SETTINGS = (
    "tau", "min_coverage", "token_filter", "topk_tokens_per_seq", "normalize", "merge_across_layers", "return_top_x",
    "first_positions", "max_norm_ratio", "attention_sinks", "selectivity_background", "chat_template", "layers",
    "streams",
)  # fmt: skip
"""Of an answer, by the names of its `analyzed`: where they differ, rankings differ for that reason, too."""

Site = tuple[str, str]
"""A hook point, and the digest of the SAE there; its name where an answer has no digests."""
Key = tuple[Site, int]
"""Of a feature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDrift:
    """How far the rankings of two files of answers lie apart."""

    num_prompts: int
    """That both answer."""
    num_failed: int
    """That at least one has an error for; they are left out."""
    num_common: int
    """Features in both rankings, over all prompts."""
    num_only: tuple[int, int]
    """Features in the first ranking only, and in the second only."""
    rank_correlation: float | None
    """Spearman's, of the scores of the common features, over all prompts together; null if there are fewer than two,
    or one side is constant."""
    overlap: dict[int, float]
    """Share of the best n of one ranking that are among the best n of the other: mean over the rankings that have n
    features on both sides. No n that no ranking has."""
    notes: tuple[str, ...]
    """What else differs between the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    given: str | None
    """The prompt or text; None where the file does not say it."""
    settings: Mapping[str, Any]
    saes: Mapping[str, frozenset[str]]
    """Digests of the SAEs at each hook point."""
    rankings: Mapping[Site | None, tuple[tuple[Key, float], ...]]
    """Features and scores, best first; by site, or one over all sites under None."""


def rank_drift(a: Path, b: Path) -> RankDrift:
    """Compare two files that `sae_discover` wrote for the same prompts, .json or .jsonl.

    Raises:
        SourceError: if they are not that, or cannot be compared: other prompts, other SAEs, another score.
    """
    first, second = _answers(a), _answers(b)
    if len(first) != len(second):
        raise SourceError(f"{a} answers {len(first)} prompts and {b} {len(second)}; expected the same prompts")
    answered = [(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None]
    for number, (x, y) in enumerate(zip(first, second, strict=True), 1):
        if x is not None and y is not None:
            _check_pair(f"prompt {number} of {a} and {b}", x, y)
    scores: list[tuple[float, float]] = []
    only = [0, 0]
    shares: dict[int, list[float]] = {}
    for x, y in answered:
        for site in x.rankings.keys() | y.rankings.keys():
            left, right = dict(x.rankings.get(site, ())), dict(y.rankings.get(site, ()))
            scores += [(left[key], right[key]) for key in left if key in right]
            only[0] += len(left.keys() - right.keys())
            only[1] += len(right.keys() - left.keys())
            for size in _SIZES:
                if size <= min(len(left), len(right)):
                    shares.setdefault(size, []).append(len({*[*left][:size]} & {*[*right][:size]}) / size)
    both = np.array(scores, np.float64).reshape(-1, 2)
    return RankDrift(
        num_prompts=len(answered),
        num_failed=len(first) - len(answered),
        num_common=len(both),
        num_only=(only[0], only[1]),
        rank_correlation=rank_correlation(both[:, 0], both[:, 1]),
        overlap={size: float(np.mean(values)) for size, values in sorted(shares.items())},
        notes=tuple(_notes(answered)),
    )


def _check_pair(what: str, a: _Answer, b: _Answer) -> None:
    """Raise SourceError if two answers say nothing about each other."""
    if a.given is not None and b.given is not None and a.given != b.given:
        raise SourceError(f"{what} are not the same: {a.given[:60]!r} and {b.given[:60]!r}; ask both the same prompts")
    if a.settings.get("score_mode") != b.settings.get("score_mode"):
        raise SourceError(
            f"{what} are ranked by {a.settings.get('score_mode')} and {b.settings.get('score_mode')}; use one "
            "--score_mode for both"
        )
    for hook_point in a.saes.keys() & b.saes.keys():
        if not a.saes[hook_point] & b.saes[hook_point]:
            raise SourceError(
                f"{what} are about different SAEs at {hook_point}, whose feature ids have nothing to do with each "
                "other; use the same --sae for both"
            )


def _notes(answered: Sequence[tuple[_Answer, _Answer]]) -> Iterator[str]:
    if any(x.given is None or y.given is None for x, y in answered):
        yield "a file does not say what its prompts were, so nothing proves that they are the same"
    for name in _SETTINGS:
        pairs = {repr((x.settings.get(name), y.settings.get(name))): (x, y) for x, y in answered}
        differing = [(x.settings.get(name), y.settings.get(name)) for x, y in pairs.values()]
        differing = [pair for pair in differing if pair[0] != pair[1]]
        if differing:
            yield f"{name} differs: {differing[0][0]} and {differing[0][1]}"


def _answers(path: Path) -> list[_Answer | None]:
    """The answers of a file; None for a prompt that has an error instead."""
    try:
        body = path.read_bytes()
        lines = [line for line in json_lines.lines(body) if line.strip()]
        found = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(body)
        return [_answer(record) for record in (found if isinstance(found, list) else [found])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is not a .json or .jsonl file of sae_discover: {error!r:.200}") from error


def _answer(record: Mapping[str, Any]) -> _Answer | None:
    if "error" in record:
        return None
    analyzed = record.get("analyzed", {})
    digests = {(sae["hook_point"], sae["sae"]): sae["digest"] for sae in analyzed.get("saes", ())}
    saes: dict[str, set[str]] = {}
    for (hook_point, _), digest in digests.items():
        saes.setdefault(hook_point, set()).add(digest)
    rankings: dict[Site | None, list[tuple[Key, float]]] = {}
    for feature in record["features"]:
        hook_point = feature.get("hook_point", f"{feature['layer']}/{feature['stream']}")
        sae = feature.get("sae", "")
        site = (hook_point, digests.get((hook_point, sae), sae))
        ranking = rankings.setdefault(None if analyzed.get("merge_across_layers", True) else site, [])
        ranking.append(((site, feature["feature_id"]), float(feature["score"])))
    return _Answer(
        given=analyzed.get("given"),
        settings=analyzed,
        saes={hook_point: frozenset(found) for hook_point, found in saes.items()},
        rankings={site: tuple(ranking) for site, ranking in rankings.items()},
    )
