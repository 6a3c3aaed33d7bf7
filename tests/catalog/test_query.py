"""Questions to a catalog, against answers found by reading whole tables and all codes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_census.config.query import QueryConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.query import query
from sae_census.flows.catalog.reader import Catalog, catalog_names
from sae_census.flows.census.analyze import analyze
from sae_census.io.checkpoints import load_sae

POINT, SAE = "blocks.1.hook_resid_post", "late"
MakeConfig = Callable[..., Any]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, analyze_config: MakeConfig) -> Catalog:
    return analyze(analyze_config(tmp_path_factory.mktemp("query"), codes="keep")).catalog


def ask(catalog: Catalog, **keys: Any) -> list[dict[str, Any]]:
    return query(QueryConfig.model_validate({"store": {"root": str(catalog.folder.parents[2])}, **keys}))


def test_stored_codes_are_all_firings_of_the_feature(catalog: Catalog) -> None:
    for feature in (0, 6, 40):
        codes = list(catalog.codes(POINT, SAE, feature))
        row = catalog.feature(POINT, SAE, feature)
        assert len(codes) == row["count"]
        assert max((code["value"] for code in codes), default=0) == row["max"]
        assert len({(code["shard_id"], code["context_id"]) for code in codes}) == row["context_count"]


def test_rows_of_saes_that_measure_codes_otherwise_say_their_units(catalog: Catalog) -> None:
    early = "activations after a layer norm, token by token"
    assert catalog.units == {"blocks.0.hook_resid_post/early": early, f"{POINT}/{SAE}": "raw activations"}
    both = ask(catalog, ask="best", limit=20)
    assert {row["sae"]: row["unit"] for row in both} == {"early": early, SAE: "raw activations"}
    assert all("unit" not in row for row in ask(catalog, ask="best", sae=SAE))


def test_coactive_features_are_those_that_share_contexts(catalog: Catalog) -> None:
    contexts: dict[int, set[tuple[str, int]]] = {}
    for feature in range(96):
        found = {(code["shard_id"], code["context_id"]) for code in catalog.codes(POINT, SAE, feature)}
        contexts[feature] = found
    feature = max(contexts, key=lambda f: len(contexts[f]))
    mine = contexts[feature]
    expected = {
        f: (len(mine & other), len(other), len(mine & other) / len(mine | other))
        for f, other in contexts.items()
        if f != feature and mine & other
    }
    order = sorted(expected, key=lambda f: (-expected[f][2], f))[:7]
    rows = catalog.coactive(POINT, SAE, feature, 7)
    assert [row["feature_id"] for row in rows] == order
    assert [(r["contexts"], r["context_count"], r["jaccard"]) for r in rows] == [expected[f] for f in order]


def test_nearest_features_have_the_largest_cosine(catalog: Catalog, sae_dirs: dict[str, Path]) -> None:
    rows = load_sae(str(sae_dirs["late"])).sae.w_dec.double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit[9]
    order = [i for i in np.argsort(-cosine) if i != 9][:5]
    found = catalog.nearest(POINT, SAE, 9, 5)
    assert [row["feature_id"] for row in found] == order
    np.testing.assert_allclose([row["cosine"] for row in found], cosine[order], atol=1e-6)


def test_firing_on_finds_every_span_that_fires_on_the_text(catalog: Catalog) -> None:
    text = "bridge"
    expected: Counter[tuple[str, str, int]] = Counter()
    seen = set()
    for row in catalog.features.to_pylist():
        key = (row["hook_point"], row["sae"], row["feature_id"])
        for span in catalog.spans(*key).to_pylist():
            address = (key, span["shard_id"], span["context_id"], span["start"])
            ends = np.cumsum([len(token) for token in span["tokens"]])
            whole = "".join(span["tokens"])
            hits = [i for i in range(len(whole)) if whole.startswith(text, i)]
            fires = any(
                value > 0 and begin < hit + len(text) and end > hit
                for hit in hits
                for begin, end, value in zip([0, *ends], ends, span["values"], strict=False)
            )
            if fires and span["value"] > 0 and text in span["text"] and address not in seen:
                seen.add(address)
                expected[key] += 1
    found = catalog.firing_on(text, 1000)
    assert found
    assert {(r["hook_point"], r["sae"], r["feature_id"]): r["num_spans"] for r in found} == dict(expected)
    assert [r["num_spans"] for r in found] == sorted(expected.values(), reverse=True)


def test_a_slice_is_ordered_by_the_column(catalog: Catalog) -> None:
    rows = ask(catalog, ask="slice", text="notes", by="max", limit=500)
    assert {row["slice"] for row in rows} == {"notes"}
    assert [row["max"] for row in rows] == sorted((row["max"] for row in rows), reverse=True)
    assert len(rows) == 64 + 96


def test_pages_join_to_the_whole_ranking(catalog: Catalog) -> None:
    pages = [row for start in range(0, 200, 7) for row in catalog.page(start, 7)]
    assert len(pages) == 64 + 96
    assert [(r["rank"], r["hook_point"], r["sae"]) for r in pages] == sorted(
        (r["rank"], r["hook_point"], r["sae"]) for r in pages
    )
    assert catalog_names(catalog.folder.parents[2]) == ["default"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ask": "search"}, "ask=search needs text"),
        ({"ask": "nearest", "sae": "late"}, "needs feature="),
        ({"ask": "feature", "feature": 3}, "2 SAEs fit"),
        ({"ask": "feature", "sae": "late", "feature": 96}, "there is no feature 96"),
        ({"ask": "slice", "text": "poems"}, "there is no slice 'poems'; the catalog has notes, prose"),
        ({"ask": "slice", "text": "notes", "by": "mood"}, "slices have no number 'mood'"),
        ({"ask": "best", "snapshot": 7}, "snapshot 7"),
    ],
)
def test_questions_that_cannot_be_answered_say_why(catalog: Catalog, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(catalog, **keys)


def test_codes_that_were_not_kept_are_missed_by_name(tmp_path: Path, analyze_config: MakeConfig) -> None:
    plain = analyze(analyze_config(tmp_path)).catalog
    with pytest.raises(ConfigError, match="codes were not kept; analyze with codes=keep"):
        list(plain.codes(POINT, SAE, 3))
