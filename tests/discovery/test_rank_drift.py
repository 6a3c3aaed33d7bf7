"""Rankings of two answers to the same prompts are compared where both have ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from sae_census.errors import SourceError
from sae_census.flows.discovery.rank_drift import RankDrift, rank_drift


def ranking_of(given: str = "a", digest: str = "d", **scores: float) -> dict[str, Any]:
    """An answer as `sae_discover` writes it, as far as a comparison reads it."""
    rows = [
        {"hook_point": "blocks.1.hook_resid_post", "sae": "s", "feature_id": int(name[1:]), "score": score}
        | {"layer": 1, "stream": "resid_post"}
        for name, score in scores.items()
    ]
    saes = [{"hook_point": "blocks.1.hook_resid_post", "sae": "s", "digest": digest}]
    analyzed = {"given": given, "saes": saes, "merge_across_layers": True, "score_mode": "mean", "tau": "p95"}
    return {"analyzed": analyzed, "features": rows}


def drift_of(folder: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> RankDrift:
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for file, answers in zip(files, (first, second), strict=True):
        file.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers), "utf-8")
    return rank_drift(*files)


def test_rank_drift_compares_what_both_answers_rank(tmp_path: Path) -> None:
    first = [ranking_of(f1=5.0, f2=4.0, f3=3.0, f4=2.0, f5=1.0), ranking_of("b\u2028c", f1=1.0), ranking_of("d")]
    second = [
        ranking_of(f2=5.0, f1=4.0, f3=3.0, f4=2.0, f9=1.0), ranking_of("b\u2028c", f1=2.0), {"line": 3, "error": {}},
    ]  # fmt: skip
    drift = drift_of(tmp_path, first, second)
    a, b = [5, 4, 3, 2, 1], [4, 5, 3, 2, 2]
    assert (drift.num_prompts, drift.num_failed, drift.num_common, drift.num_only) == (2, 1, 5, (1, 1))
    assert drift.rank_correlation == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert drift.overlap == {5: 0.8}
    assert drift.notes == ()


def test_an_answer_with_nothing_in_it_agrees_with_none(tmp_path: Path) -> None:
    many = {f"f{i}": float(100 - i) for i in range(25)}
    drift = drift_of(tmp_path, [ranking_of(**many)], [ranking_of()])
    assert (drift.rank_correlation, drift.overlap, drift.num_only) == (None, {}, (25, 0))
    drift = drift_of(tmp_path, [ranking_of(**many)], [ranking_of(f0=3.0, f1=2.0, f2=1.0, f3=0.5, f99=0.4)])
    assert drift.overlap == {5: 0.8}


def test_two_saes_at_one_hook_point_are_two_sets_of_features(tmp_path: Path) -> None:
    both, other = ranking_of(f1=2.0, f2=1.0), ranking_of(f1=1.0, f2=2.0)
    both["features"] += [row | {"sae": "t", "score": 9.0} for row in other["features"]]
    both["analyzed"]["saes"] += [both["analyzed"]["saes"][0] | {"sae": "t", "digest": "e"}]
    assert drift_of(tmp_path, [both], [both]).num_common == 4


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([], "expected the same prompts"),
        ([ranking_of("other", f1=1.0)], "are not the same: 'a' and 'other'"),
        ([ranking_of(digest="e", f1=1.0)], "different SAEs"),
    ],
)
def test_answers_that_say_nothing_about_each_other_are_not_compared(second, says, tmp_path):
    with pytest.raises(SourceError, match=says):
        drift_of(tmp_path, [ranking_of(f1=1.0)], second)


def test_settings_that_differ_are_told_or_refused(tmp_path: Path) -> None:
    mine, other = ranking_of(f1=1.0), ranking_of(f1=1.0)
    other["analyzed"]["tau"] = "constant 0"
    assert drift_of(tmp_path, [mine], [other]).notes == ("tau differs: p95 and constant 0",)
    other["analyzed"]["score_mode"] = "max"
    with pytest.raises(SourceError, match="ranked by mean and max"):
        drift_of(tmp_path, [mine], [other])
    with pytest.raises(SourceError, match=r"is not a \.json or \.jsonl file"):
        rank_drift(tmp_path / "a.jsonl", tmp_path / "missing.json")
