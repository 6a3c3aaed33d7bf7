"""Compare two answers to the same prompt, of a base and a fine-tuned model say: did other features lead?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.compute.drift import overlap, rank_correlation
from pipeline.errors import SourceError

_SIZES = (5, 10, 25, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDrift:
    """How far two rankings lie apart. A feature that one of them lacks has a score of 0 there."""

    num_prompts: int
    num_features: int
    """In either ranking, over all prompts."""
    rank_correlation: float
    """Spearman's, over all prompts together; NaN where one side is constant."""
    overlap: dict[int, float]
    """Share of the best n of one that are among the best n of the other, mean over prompts with so many features."""


def rank_drift(a: Path, b: Path) -> RankDrift:
    """Compare two files that `sae_discover` wrote for the same prompts, .json or .jsonl.

    Raises:
        SourceError: if they are not that.
    """
    first, second = _answers(a), _answers(b)
    if len(first) != len(second):
        raise SourceError(f"{a} answers {len(first)} prompts and {b} {len(second)}; expected the same prompts")
    scores: list[np.ndarray] = []
    shares: dict[int, list[float]] = {}
    for left, right in zip(first, second, strict=True):
        keys = sorted(left.keys() | right.keys())
        pair = np.array([[side.get(key, 0.0) for key in keys] for side in (left, right)]).reshape(2, -1)
        scores.append(pair)
        for size, share in overlap(pair[0], pair[1], _SIZES).items():
            shares.setdefault(size, []).append(share)
    both = np.concatenate([np.zeros((2, 0)), *scores], axis=1)
    return RankDrift(
        num_prompts=len(first),
        num_features=both.shape[1],
        rank_correlation=rank_correlation(both[0], both[1]),
        overlap={size: float(np.mean(values)) for size, values in sorted(shares.items())},
    )


def _answers(path: Path) -> list[dict[tuple[Any, ...], float]]:
    """Scores by (layer, stream, feature) of every prompt."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        records = found if isinstance(found, list) else [found]
        return [
            {(f["layer"], f["stream"], f["feature_id"]): float(f["score"]) for f in record.get("features", ())}
            for record in records
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is not a .json or .jsonl file of sae_discover: {error!r:.200}") from error
