"""The report: every number is the catalog's, no text becomes markup, the same snapshot gives the same bytes."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_census.cli import analyze as jobs_analyze
from sae_census.cli import report as jobs_report
from sae_census.config import AnalyzeConfig, ReportConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.catalog.report import Report, write_report
from sae_census.flows.catalog.report_data import CHUNK
from sae_census.flows.census.analyze import analyze
from sae_census.io import report as door
from sae_census.steps.census import plan
from sae_census.steps.store.identities import MeasuredModel

MakeConfig = Callable[..., AnalyzeConfig]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]> --> <img src=x onerror=alert(1)>",
    "\u202egnirts desrever\u202c",
    "\u2028\u2029\x00\x1b[31m\x7f",
    "&lt;b&gt; \"quoted\" 'single' \\ ${x} `y`",
    "__proto__",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, analyze_config: MakeConfig) -> Path:
    """A catalog whose corpus is hostile in part, with logits."""
    folder = tmp_path_factory.mktemp("report")
    hostile = folder / "hostile.jsonl"
    hostile.write_text("".join(json.dumps({"text": f"{text} and water. "}) + "\n" for text in HOSTILE * 6))
    source = {**analyze_config(folder).corpus.source, "odd_names": str(hostile)}  # type: ignore[dict-item]
    analyze(analyze_config(folder, corpus={"source": source}, logits={"top_k": 3}), say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def catalog(root: Path) -> Catalog:
    return Catalog(root)


def written(root: Path, out: Path | None = None, **more: Any) -> Report:
    config = ReportConfig.model_validate({"store": {"root": str(root)}, "out": out and str(out), **more})
    return write_report(config, say=lambda line: None)


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return written(root).index.parent


def facts_of(folder: Path) -> dict[str, Any]:
    """What the page starts from."""
    page = (folder / "index.html").read_text()
    block = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page, re.S)
    assert block is not None
    found: dict[str, Any] = json.loads(block[1])
    return found


def value_of(path: Path) -> tuple[str, Any]:
    """Name and value that a data file hands over."""
    call = re.fullmatch(r"census\((.*)\);\n", path.read_text("ascii"), re.S)
    assert call is not None
    name, value = json.loads(f"[{call[1]}]")
    return name, value


def data_of(folder: Path, name: str) -> Any:
    found, value = value_of(folder / facts_of(folder)["data"] / f"{name}.js")
    assert found == name
    return value


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def each_feature(folder: Path) -> Any:
    """Site, its facts, the chunk and the entry of every feature."""
    for number, site in enumerate(facts_of(folder)["sites"]):
        for start in range(0, site["num_features"], CHUNK):
            chunk = data_of(folder, f"{number}/{start // CHUNK}")
            for entry in chunk["features"]:
                yield site, chunk, entry


# --- numbers ---


def test_the_table_has_the_columns_of_the_catalog(folder: Path, catalog: Catalog) -> None:
    sites = facts_of(folder)["sites"]
    assert [site["site"] for site in sites] == sorted(catalog.saes)  # both orders agree in this world
    for number, site in enumerate(sites):
        table, rows = data_of(folder, f"{number}/table"), catalog.of_sae(*site["site"].rsplit("/", 1))
        for name in ("rank", "count", "max", "mean_when_firing", "p50", "proto_label", "label"):
            assert table[name] == rows[name].to_pylist(), name
        tokens = sum(site["slice_tokens"])  # as the page does it
        assert [count / tokens for count in table["count"]] == rows["frequency"].to_pylist()
        counts = catalog.statistics(*site["site"].rsplit("/", 1))["histogram"]
        heights = np.array([[int(digit) for digit in digits] for digits in table["sparks"]])
        start, wide = site["spark_start"], site["spark_bins"]
        assert counts.sum() == counts[:, start : start + heights.shape[1] * wide].sum()
        bars = counts[:, start : start + heights.shape[1] * wide].reshape(*heights.shape, wide).sum(2)
        assert ((heights > 0) == (bars > 0)).all()
        assert (heights.max(1) == 9 * (counts.sum(1) > 0)).all()


def test_every_number_of_a_feature_is_that_of_the_catalog(folder: Path, catalog: Catalog) -> None:
    num_features = 0
    for site, _, entry in each_feature(folder):
        hook_point, sae = site["site"].rsplit("/", 1)
        row = catalog.feature(hook_point, sae, entry["feature_id"])
        assert {name: entry[name] for name in row if name in entry} == {
            name: value for name, value in row.items() if name not in ("hook_point", "sae", "layer", "stream")
        }
        num_features += 1
        if entry["feature_id"] % 7 == 0:
            mine = catalog.slices.filter(
                (np.array(catalog.slices["sae"].to_pylist()) == sae)
                & (np.asarray(catalog.slices["feature_id"]) == entry["feature_id"])
            )
            for name, values in entry["slices"].items():
                assert values == mine[name].to_pylist()
            arrays = catalog.statistics(hook_point, sae)
            first, *counts = entry["histogram"]
            whole = np.zeros(arrays["histogram"].shape[1], np.int64)
            whole[first : first + len(counts)] = counts
            assert (whole == arrays["histogram"][entry["feature_id"]]).all()
            assert entry["collapsed"] == arrays["spans_collapsed"][entry["feature_id"]].tolist()
            assert site["edges"] == arrays["histogram_edges"].tolist()
    assert num_features == catalog.features.num_rows


def test_every_span_is_that_of_the_catalog(folder: Path, catalog: Catalog) -> None:
    groups = facts_of(folder)["groups"]
    shown: list[dict[str, Any]] = []
    for site, chunk, entry in each_feature(folder):
        for group, members in zip(groups, entry.get("groups", []), strict=False):
            for sample_rank, member in enumerate(members):
                piece, document, shard, context, position, start, value, tokens, at, codes = entry["firings"][member]
                values = np.zeros(len(tokens), np.float32)
                values[at] = codes
                shown.append(
                    {
                        "hook_point": site["site"].rsplit("/", 1)[0],
                        "sae": site["site"].rsplit("/", 1)[1],
                        "feature_id": entry["feature_id"],
                        "group": group,
                        "sample_rank": sample_rank,
                        "slice": site["slices"][piece],
                        "document_id": chunk["documents"][document],
                        "shard_id": chunk["shards"][shard],
                        "context_id": context,
                        "position": position,
                        "start": start,
                        "value": float(np.float32(value)),
                        "token_ids": [chunk["tokens"][token][0] for token in tokens],
                        "tokens": [chunk["tokens"][token][1] for token in tokens],
                        "values": values.tolist(),
                    }
                )
    rows = [
        {name: row[name] for name in shown[0]}
        for site in catalog.saes
        for feature_id in range(catalog.of_sae(*site.rsplit("/", 1)).num_rows)
        for row in catalog.spans(*site.rsplit("/", 1), feature_id).to_pylist()
    ]
    ranks: dict[tuple[Any, ...], int] = {}
    for row in rows:  # collapsed spans leave gaps in the ranks of the catalog
        key = (row["sae"], row["feature_id"], row["group"])
        row["sample_rank"] = ranks[key] = ranks.get(key, -1) + 1
    assert len(rows) > 1000
    assert shown == rows


def test_every_logit_is_that_of_the_catalog(folder: Path, catalog: Catalog) -> None:
    for site, _, entry in each_feature(folder):
        if entry["feature_id"] % 31 == 0:
            rows = catalog.logits(*site["site"].rsplit("/", 1), entry["feature_id"]).to_pylist()
            for sign in ("positive", "negative"):
                mine = [[row["token_id"], row["token"], row["logit"]] for row in rows if row["sign"] == sign]
                assert len(mine) == 3
                assert [[i, token, float(np.float32(logit))] for i, token, logit in entry[sign]] == mine


def test_the_words_that_the_page_searches_are_those_that_the_catalog_searches(folder: Path, catalog: Catalog) -> None:
    found = {(row["sae"], row["feature_id"]) for row in catalog.search("RE", 10_000) if row["num_spans"]}
    assert found
    on_page = set()
    for number, site in enumerate(facts_of(folder)["sites"]):
        table = data_of(folder, f"{number}/table")
        matching = {i for i, word in enumerate(table["words"]) if "re" in word}
        on_page |= {
            (site["site"].rsplit("/", 1)[1], i) for i, peaks in enumerate(table["peaks"]) if matching & {*peaks}
        }
    assert on_page == found


def test_the_page_says_what_the_catalog_is(folder: Path, catalog: Catalog) -> None:
    facts, manifest = facts_of(folder), catalog.manifest
    assert facts["digest"] == catalog.digest
    assert facts["slices"] == [[name, books.tokens, books.contexts] for name, books in manifest.coverage.slices.items()]
    for site in facts["sites"]:
        hook_point, sae = site["site"].rsplit("/", 1)
        assert dict(site["tokens"]) == manifest.coverage.tokens[hook_point]
        assert site["fvu"] == manifest.fraction_of_variance_unexplained[site["site"]]
        assert site["dead"] == sum(catalog.of_sae(hook_point, sae)["dead"].to_pylist()) >= 3
        assert site["l0"] == pytest.approx(
            sum(catalog.of_sae(hook_point, sae)["count"].to_pylist()) / sum(site["slice_tokens"])
        )


# --- safety ---


def test_no_text_of_the_corpus_can_leave_its_string(folder: Path) -> None:
    names = []
    for path in sorted(folder.rglob("*.js")):
        text = path.read_text("ascii")  # no invisible or reordering character anywhere
        assert not re.search(r"[<>&\x00-\x09\x0b-\x1f\x7f]", text)
        names.append(value_of(path)[0])
    assert len(set(names)) == len(names) > 4
    firings = [
        "".join(chunk["tokens"][token][1] for token in tokens)
        for _, chunk, entry in each_feature(folder)
        for *_, tokens, _, _ in entry.get("firings", [])
    ]
    assert any("<script>" in text for text in firings)  # the corpus did come through
    assert any("\x1b[31m" in text for text in firings)
    assert "odd_names" in [name for name, *_ in facts_of(folder)["slices"]]
    page = (folder / "index.html").read_text()
    assert page.count("</script>") == 2
    assert "<i>" not in page
    assert not any(unicodedata.category(c) in ("Cf", "Cc", "Zl", "Zp") and c != "\n" for c in page)


def test_a_title_is_escaped() -> None:
    page = door.viewer("<b>&", {"name": "</script><b>"}).decode()
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert "<b>" not in page


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_survives_unchanged_as_data(text: str, tmp_path: Path) -> None:
    path = tmp_path / "one.js"
    path.write_bytes(door.data_file(text, [text, {"token": text}]))
    assert value_of(path) == (text, [text, {"token": text}])
    assert re.fullmatch(rb"[^<>&\x00-\x09\x0b-\x1f\x7f-\xff]*", path.read_bytes())


def test_the_policy_lets_run_the_scripts_of_the_page_and_fetches_nothing(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert page.index("Content-Security-Policy") < page.index("<script") < len(page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    for tag, rule in (("<script>", "script-src"), ("<style>", "style-src")):
        source = page.split(tag)[1].split(f"</{tag[1:]}")[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        others = rules[rule].replace(f"'sha256-{digest}'", "").split()
        assert len(others) == len(rules[rule].split()) - 1
        assert others == (["'self'", "file:"] if rule == "script-src" else [])


def test_the_script_makes_no_markup_of_text_and_asks_no_network(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    script = page.split("<script>")[1].split("</script>")[0]
    for door_to_markup in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "DOMParser",
    ):
        assert door_to_markup not in script
    for network in ("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "import("):
        assert network not in script
    addresses = set(re.findall(r"https?://[^\"'\s]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_script_can_be_parsed(folder: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = tmp_path / "viewer.js"
    script.write_text((folder / "index.html").read_text().split("<script>")[1].split("</script>")[0])
    assert subprocess.run([node, "--check", script], check=False, capture_output=True).returncode == 0


# --- files ---


def test_the_same_snapshot_gives_the_same_bytes(root: Path, folder: Path, tmp_path: Path) -> None:
    assert files_of(written(root, tmp_path / "again").index.parent) == files_of(folder)


def test_a_bound_on_features_keeps_all_numbers_and_says_so(root: Path, folder: Path, tmp_path: Path) -> None:
    bounded = written(root, tmp_path, features=5).index.parent
    assert facts_of(bounded)["features_with_spans"] == 5
    assert facts_of(folder)["features_with_spans"] is None
    for (_, _, few), (_, _, every) in zip(each_feature(bounded), each_feature(folder), strict=True):
        if every["rank"] <= 5:
            assert len(few["firings"]) == len(every["firings"]) > 0
        else:
            assert not few.get("firings")
        assert few | {"firings": 0, "groups": 0} == every | {"firings": 0, "groups": 0}


def test_no_spans_at_all(root: Path, tmp_path: Path) -> None:
    bounded = written(root, tmp_path, features=0).index.parent
    assert not any(entry.get("firings") for _, _, entry in each_feature(bounded))


def test_a_new_report_replaces_the_old_one_and_nothing_else(root: Path, folder: Path, tmp_path: Path) -> None:
    written(root, tmp_path, features=5)
    (tmp_path / "data" / "mine").mkdir()
    (tmp_path / "data" / "mine" / "kept.txt").write_text("kept")
    written(root, tmp_path)
    assert files_of(tmp_path) == files_of(folder) | {"data/mine/kept.txt": b"kept"}


def test_a_report_that_died_is_finished_by_the_next_run(
    root: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(root, tmp_path, features=5)
    before = (tmp_path / "index.html").read_bytes()
    made = door.data_file
    calls = iter([None, None])

    def dies(name: str, value: Any) -> bytes:
        if next(calls, "dead"):
            raise KeyboardInterrupt
        return made(name, value)

    monkeypatch.setattr("sae_census.io.report.data_file", dies)
    with pytest.raises(KeyboardInterrupt):
        written(root, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before
    assert (tmp_path / facts_of(tmp_path)["data"] / "0" / "table.js").is_file()  # the old report still stands
    monkeypatch.undo()
    written(root, tmp_path)
    assert files_of(tmp_path) == files_of(folder)


def test_the_report_lies_beside_the_snapshot(root: Path, folder: Path, catalog: Catalog) -> None:
    assert folder == catalog.attached / "report"


def test_a_missing_snapshot_is_named(root: Path) -> None:
    with pytest.raises(ConfigError, match="no catalog 'default' with snapshot 9"):
        written(root, snapshot=9)


# --- jobs ---


def test_the_job_says_where_the_report_is(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ReportConfig.model_validate({"store": {"root": str(root)}, "out": str(tmp_path)})
    assert jobs_report.job(config) == 0
    assert f"report    {tmp_path}/index.html" in capsys.readouterr().out


def test_analyze_writes_the_report_of_what_it_published(
    root: Path, folder: Path, analyze_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AnalyzeConfig.model_validate(Catalog(root).manifest.config)
    shutil.rmtree(folder)
    assert not config.report
    assert jobs_analyze.job(config.model_copy(update={"report": True})) == 0
    out = capsys.readouterr().out
    assert f"report    {folder}/index.html" in out
    assert "(unchanged)" in out  # asking for a report makes no other catalog
    assert facts_of(folder)["digest"] == Catalog(root).digest


def test_asking_for_a_report_changes_no_identity(analyze_config: MakeConfig, tmp_path: Path) -> None:
    with_report, without = analyze_config(tmp_path, report=True), analyze_config(tmp_path)
    model = MeasuredModel(digest="", family="", dtype="", tokenizer="")
    assert plan.measures_of(with_report, model, {}, {}) == plan.measures_of(without, model, {}, {})
