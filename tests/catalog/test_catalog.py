"""A catalog says what the slow twin says: every number, every span, every book."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from reference import COUNTED, RULES, Context, Site, Twin, octave

from sae_census.compute.numbers import fixed
from sae_census.compute.numbers.stats import QUANTILE_ERROR
from sae_census.config import AnalyzeConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze

SETTINGS: dict[str, dict[str, Any]] = {
    "concat": {},
    "concat_without_bos": {
        "corpus": {"bos": "never", "context_length": 24, "shard_tokens": 240},
        "masks": {"first_positions": 2, "positions": [5, 23]},
        "model": "sinky",
        "ranking": {"score": "surprise"},
        "sampling": {"bands": 2, "per_band": 6, "low_activating": 2, "before": 5, "after": 0},
    },
    "document_chunks": {
        "corpus": {"packing": "document", "bos": "always"},
        "masks": {"special_tokens": False, "max_norm_ratio": 1.2},
        "ranking": {"score": "mean_when_firing"},
    },
    "document_truncated": {
        "corpus": {"packing": "document", "long_documents": "truncate", "bos": "never", "context_length": 24},
        "masks": {"max_norm_ratio": 1.1, "first_positions": 1},
        "ranking": {"score": "max"},
        "batch": {"contexts": 7},
    },
}

KEY = ["hook_point: string", "sae: string", "feature_id: int32"]
SCHEMAS = {
    "features.parquet": [
        *KEY, "layer: int32", "stream: string", "rank: int32", "score: double", "count: int64",
        "tokens_counted: int64", "frequency: double", "context_count: int64", "context_frequency: double",
        "mean: double", "mean_when_firing: double", "std: double", "max: double", "p50: double", "p95: double",
        "p99: double", "dead: bool", "proto_label: string", "label: string", "decoder_norm: double",
    ],
    "slices.parquet": [
        *KEY, "slice: string", "count: int64", "tokens_counted: int64", "frequency: double", "sum: double",
        "mean_when_firing: double", "max: double",
    ],
    "spans.parquet": [
        *KEY, "group: string", "sample_rank: int32", "shard_id: string", "context_id: int32",
        "document_id: string", "slice: string", "position: int32", "start: int32", "stop: int32", "value: float",
        "text: string", "tokens: list<element: string>", "token_ids: list<element: int32>",
        "values: list<element: float>",
    ],
}  # fmt: skip
SITES = (("blocks.0.hook_resid_post", "early"), ("blocks.1.hook_resid_post", "late"))
EXACT = ("count", "tokens_counted", "context_count", "max", "dead", "rank")
CLOSE = ("frequency", "context_frequency", "mean", "mean_when_firing", "std", "score", "decoder_norm")


@dataclass(frozen=True, kw_only=True)
class World:
    """One setting, analysed twice: by the pipeline and by its slow twin."""

    config: AnalyzeConfig
    catalog: Catalog
    twin: Twin

    def spans(self, site: Site) -> dict[int, dict[str, list[dict[str, Any]]]]:
        """Spans of a site by feature and group, in the order of the table."""
        found: dict[int, dict[str, list[dict[str, Any]]]] = {f: {} for f in range(site.codes.shape[2])}
        for feature, groups in found.items():
            for row in self.catalog.spans(site.hook_point, site.sae, feature).to_pylist():
                groups.setdefault(row["group"], []).append(row)
        return found


@pytest.fixture(scope="module", params=SETTINGS)
def world(request, tmp_path_factory, analyze_config, sinky_dir) -> World:
    settings = dict(SETTINGS[request.param])
    if "model" in settings:
        settings["model"] = {"id": str(sinky_dir)}
    config = analyze_config(tmp_path_factory.mktemp("runs"), **settings)
    analysis = analyze(config, lambda line: None)
    assert analysis.failures == ()
    return World(config=config, catalog=analysis.catalog, twin=Twin(config))


@pytest.fixture(scope="module")
def spans(world):
    """Per site: its spans, and its contexts by address."""
    places = {(c.shard_id, c.row): (i, c) for i, c in enumerate(world.twin.contexts)}
    return [(site, world.spans(site), places) for site in world.twin.sites]


def rows_of(table, site: Site) -> list[dict[str, Any]]:
    return [r for r in table.to_pylist() if (r["hook_point"], r["sae"]) == (site.hook_point, site.sae)]


def test_tables_have_the_binding_columns_in_order(world):
    import pyarrow.parquet as pq

    for name, columns in SCHEMAS.items():
        schema = pq.read_schema(world.catalog.folder / name)
        assert [f"{field.name}: {field.type}" for field in schema] == columns


def test_features_are_sorted_by_key_and_complete(world):
    keys = [(r["hook_point"], r["sae"], r["feature_id"]) for r in world.catalog.features.to_pylist()]
    assert keys == [(s.hook_point, s.sae, f) for s in world.twin.sites for f in range(s.codes.shape[2])]


def test_every_number_of_a_feature_equals_the_twins(world):
    for site in world.twin.sites:
        rows, expected = rows_of(world.catalog.features, site), world.twin.features(site)
        for name in EXACT:
            assert [row[name] for row in rows] == expected[name].tolist(), name
        for name in CLOSE:
            np.testing.assert_allclose([row[name] for row in rows], expected[name], rtol=1e-6, err_msg=name)
        for name in ("p50", "p95", "p99"):
            np.testing.assert_allclose([r[name] for r in rows], expected[name], rtol=QUANTILE_ERROR, err_msg=name)
        assert {(row["layer"], row["stream"]) for row in rows} == {(int(site.hook_point.split(".")[1]), "resid_post")}


def test_every_number_of_a_slice_equals_the_twins(world):
    for site in world.twin.sites:
        rows, expected = rows_of(world.catalog.slices, site), world.twin.slices(site)
        assert [(row["feature_id"], row["slice"]) for row in rows] == sorted(expected)
        for row in rows:
            mine = expected[row["feature_id"], row["slice"]]
            for name in ("count", "tokens_counted", "max"):
                assert row[name] == mine[name]
            for name in ("frequency", "sum", "mean_when_firing"):
                assert row[name] == pytest.approx(mine[name], rel=1e-6)


def test_every_sum_over_the_documents_of_a_slice_equals_the_twins(world):
    for site in world.twin.sites:
        arrays, expected = world.catalog.statistics(site.hook_point, site.sae), world.twin.documents(site)
        assert sorted(world.catalog.manifest.coverage.slices) == sorted(expected)
        for i, (_, (tokens, counts, totals)) in enumerate(sorted(expected.items())):
            exact = {
                "documents": len(tokens),
                "tokens": tokens.sum(),
                "tokens_square": (tokens**2).sum(),
                "count": counts.sum(axis=0),
                "document_count": (counts > 0).sum(axis=0),
                "document_count_square": (counts**2).sum(axis=0),
                "document_count_tokens": tokens @ counts,
            }
            for name, numbers in exact.items():
                assert np.array_equal(arrays[f"slice_{name}"][..., i], numbers), name
            close = {
                "total": (totals.sum(axis=0), fixed.SUM_SCALE),
                "document_total_square": ((totals**2).sum(axis=0), fixed.SQUARE_SCALE),
                "document_total_tokens": (tokens @ totals, fixed.SUM_SCALE),
            }
            for name, (numbers, scale) in close.items():
                found = fixed.to_float(arrays[f"slice_{name}"][:, i], scale)
                np.testing.assert_allclose(found, numbers, rtol=1e-6, err_msg=name)


def test_the_manifest_books_every_token_and_record(world):
    manifest, twin = world.catalog.manifest, world.twin
    coverage = manifest.coverage
    for site in twin.sites:
        books = coverage.tokens[site.hook_point]
        assert books == site.books()
        assert books[COUNTED] + sum(books[rule] for rule in RULES) == (
            len(twin.contexts) * world.config.corpus.context_length
        )
        unexplained = manifest.fraction_of_variance_unexplained[f"{site.hook_point}/{site.sae}"]
        assert unexplained == pytest.approx(site.unexplained, rel=1e-5)
    taken = [books["attention_sinks"] for books in coverage.tokens.values()]
    assert all(taken) if "sinky" in world.config.model.id else not any(taken)
    assert coverage.tokens_truncated == twin.tokens_truncated
    assert coverage.records_dropped == dict(twin.dropped) == {"empty": 1, "missing_column": 1, "not_json": 1}
    for name, counts in coverage.slices.items():
        mine = [context for context in twin.contexts if context.slice == name]
        assert counts.content() == {
            "contexts": len(mine),
            "shards": len({context.shard_id for context in mine}),
            "tokens": sum(len(context.ids) for context in mine),
        }
    assert coverage.complete
    assert coverage.missing == ()


def test_the_books_of_the_arrays_balance(world):
    for site in world.twin.sites:
        arrays = world.catalog.statistics(site.hook_point, site.sae)
        codes, counted = site.codes, np.array(site.rules) == COUNTED
        assert (arrays["histogram"].sum(axis=1) == arrays["count"]).all()
        assert (arrays["count"] <= counted.sum()).all()
        assert (arrays["context_count"] <= arrays["count"]).all()
        assert (arrays["maximum"] == codes.max(axis=(0, 1))).all()
        assert (arrays["l0_histogram"].cumsum()[-1], len(arrays["l0_histogram"])) == (counted.sum(), 1025)
        l0 = np.bincount((codes > 0).sum(axis=2)[counted], minlength=1025)
        assert (arrays["l0_histogram"] == l0).all()
        for feature in range(codes.shape[2]):
            fired = codes[:, :, feature][codes[:, :, feature] > 0]
            histogram, _ = np.histogram(fired.astype(np.float64), arrays["histogram_edges"])
            assert (histogram == arrays["histogram"][feature]).all()


def test_a_span_is_a_window_of_its_document(world, spans):
    sampling = world.config.sampling
    for _, by_feature, places in spans:
        for row in (row for groups in by_feature.values() for rows in groups.values() for row in rows):
            context: Context = places[row["shard_id"], row["context_id"]][1]
            start, stop = context.window(row["position"], sampling.before, sampling.after)
            assert (row["start"], row["stop"]) == (start, stop)
            assert set(context.documents[start:stop]) == {row["document_id"]}
            assert row["token_ids"] == context.ids[start:stop]
            assert row["slice"] == context.slice
            assert row["text"] == world.twin.tokenizer.decode(context.ids[start:stop])
            assert "".join(row["tokens"]) == row["text"]
            for text, token in zip(row["tokens"], row["token_ids"], strict=True):
                alone = world.twin.tokenizer.decode([token])
                assert text == alone or "\ufffd" in alone


def test_a_code_recomputed_at_an_address_equals_the_stored_one(spans):
    for site, by_feature, places in spans:
        for feature, groups in by_feature.items():
            for group, rows in groups.items():
                for row in rows:
                    index, _ = places[row["shard_id"], row["context_id"]]
                    codes = site.codes[index, :, feature]
                    assert row["values"] == codes[row["start"] : row["stop"]].tolist()
                    assert row["value"] == codes[row["position"]]
                    assert (row["value"] > 0) == (group != "non_activating")


def test_the_strongest_contexts_are_the_twins_but_for_near_duplicates(world, spans):
    for site, by_feature, places in spans:
        collapsed = world.catalog.statistics(site.hook_point, site.sae)["spans_collapsed"]
        column = world.catalog.manifest.span_groups.index("top")
        for feature, groups in by_feature.items():
            seen, kept = set(), {}
            expected = world.twin.top(site, feature)
            for rank, (value, index, position) in enumerate(expected):
                around = world.twin.around(index, position)
                if around not in seen:
                    kept[rank] = (value, index, position)
                seen.add(around)
            found = {
                row["sample_rank"]: (row["value"], places[row["shard_id"], row["context_id"]][0], row["position"])
                for row in groups.get("top", [])
            }
            assert found == kept
            assert collapsed[feature, column] == len(expected) - len(kept)
    assert any(groups for _, by_feature, _ in spans for groups in by_feature.values())


def test_every_group_holds_what_it_promises(world, spans):
    sampling = world.config.sampling
    names = ["top", "random", *(f"band_{i}" for i in range(sampling.bands)), "low_activating", "non_activating"]
    assert list(world.catalog.manifest.span_groups) == names
    for site, by_feature, places in spans:
        collapsed = world.catalog.statistics(site.hook_point, site.sae)["spans_collapsed"]
        for feature, groups in by_feature.items():
            codes = site.codes[:, :, feature]
            best = octave(codes.max()) if codes.any() else 0
            below = np.array([[best - octave(value) if value else -1 for value in row] for row in codes])
            population = {"random": codes > 0, "low_activating": below >= 2}
            population |= {f"band_{i}": below == i for i in range(sampling.bands)}
            wanted = {"top": min(sampling.top, int((codes > 0).any(axis=1).sum()))}
            for group, among in population.items():
                most = sampling.per_band if group.startswith("band_") else getattr(sampling, group)
                wanted[group] = min(most, int(among.sum()))
            counted = np.array([COUNTED in rules for rules in site.rules])
            silent = counted & ~(codes > 0).any(axis=1)
            wanted["non_activating"] = min(sampling.non_activating, int(silent.sum()))
            for group, number in wanted.items():
                rows = groups.get(group, [])
                assert len(rows) + collapsed[feature, names.index(group)] == number, (feature, group)
                if group in population and population[group].sum() == number:  # all are kept, but for near duplicates
                    around = {world.twin.around(*address) for address in np.argwhere(population[group]).tolist()}
                    assert len(rows) == len(around), (feature, group)
            for row in (row for i in range(sampling.bands) for row in groups.get(f"band_{i}", [])):
                assert best - octave(row["value"]) == int(row["group"].removeprefix("band_"))
            for row in groups.get("low_activating", []):
                assert best - octave(row["value"]) >= 2
            for row in groups.get("non_activating", []):
                assert silent[places[row["shard_id"], row["context_id"]][0]]


def test_ranks_within_a_group_are_distinct_and_ascend(spans):
    for _, by_feature, _ in spans:
        for groups in by_feature.values():
            for rows in groups.values():
                ranks = [row["sample_rank"] for row in rows]
                assert ranks == sorted(set(ranks))


def test_the_catalog_answers_by_key_as_by_table(world):
    table = world.catalog.features.to_pylist()
    for row in table[::37]:
        assert world.catalog.feature(row["hook_point"], row["sae"], row["feature_id"]) == row
    best = world.catalog.best(3).to_pylist()
    assert sorted((row["hook_point"], row["rank"]) for row in best) == [
        (site.hook_point, rank) for site in world.twin.sites for rank in (1, 2, 3)
    ]
    assert json.loads((world.catalog.folder / "manifest.json").read_text())["digest"] == world.catalog.digest


def test_a_catalog_without_samples_has_the_same_numbers_and_no_spans(tmp_path, analyze_config):
    none = dict.fromkeys(("top", "random", "bands", "per_band", "low_activating", "non_activating", "silent"), 0)
    bare = analyze(analyze_config(tmp_path / "bare", sampling=none), lambda line: None).catalog
    full = analyze(analyze_config(tmp_path / "full"), lambda line: None).catalog
    assert bare.features["proto_label"].null_count == bare.features.num_rows
    assert bare.features.drop_columns("proto_label").equals(full.features.drop_columns("proto_label"))
    assert all(bare.spans(*key, feature).num_rows == 0 for key in SITES for feature in (0, 63))
