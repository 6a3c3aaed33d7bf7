"""The command line of discovery: the documented flags, its four kinds of file, batches, and hostile input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Cli

from sae_census.cli import discover as job
from sae_census.findings import Discovery
from sae_census.flows.discovery import batch as flow

REPOSITORY = Path(__file__).parents[2]
CSV_COLUMNS = [
    "feature_id", "layer", "stream", "score", "mean", "coverage", "max", "selectivity", "proto_label",
    "top_span_text",
]  # fmt: skip
LINES = [
    '{"prompt": "river water", "id": "first"}',
    '"stone bridge"',
    '{"text": "def return, \\"value\\"\\nlist", "id": 7, "other": "left aside"}',
    "",
    "{oops",
    '{"prompt": 5, "id": "number"}',
    '{"prompt": "a", "text": "b", "id": null}',
    '{"id": "nothing else"}',
    "[1]",
    '{"text": "🙂 日本", "id": ["a", 1]}',
    '{"text": "' + "x" * 100 + '", "id": "too long"}',
    '{"text": "river", "return_top_x": 1, "min_coverage": 0.01}',
    '{"text": "river", "retrun_top_x": 1}',
    '{"text": "river", "tau": {"value": 3}}',
]
BLANK_LINES = {4}
BAD_LINES = {5, 6, 7, 8, 9, 11, 13, 14}


@pytest.fixture(scope="module")
def mapping(sae_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 0 and 1, as the document's 22 and 28."""
    file = tmp_path_factory.mktemp("mapping") / "saes.yaml"
    file.write_text(f"0/resid_post: {sae_dirs['early']}\n1/resid_post: {sae_dirs['late']}\n")
    return file


@pytest.fixture
def run(cli: Cli, model_dir: Path, mapping: Path) -> Cli:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*flags: str, model: bool = True) -> tuple[int, str, str]:
        ours = ["--model", str(model_dir), "--sae", str(mapping), "--dtype", "float32", "--cache_mb", "0"]
        return cli("discover", *(ours if model else []), *flags)

    return call


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(LINES), encoding="utf-8")
    return file


def shell(*flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sae_discover", *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_documented_command(model_dir, mapping, tmp_path):
    """Every flag of the document, in its order, as a command of its own."""
    done = shell(
        "--model", str(model_dir), "--sae", str(mapping), "--prompt", "Stock market analysis indicates",
        "--generate", "true", "--gen_tokens", "20", "--layers", "0", "1", "--streams", "resid_post",
        "--restrict_features", "1", "3", "51", "40", "20", "--topk_tokens_per_seq", "64", "--return_top_x", "25",
        "--score_mode", "mean×coverage", "--min_coverage_pct", "0.05", "--merge_across_layers", "true",
        "--attach_examples", "true", "--attach_proto_labels", "true", "--seed", "42",
        "--out", "results/discover_single.json", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    answer = Discovery.model_validate_json((tmp_path / "results/discover_single.json").read_text(encoding="utf-8"))
    assert (answer.model_id, answer.sae_id) == (str(model_dir), str(mapping))
    assert (answer.analyzed.mode, answer.analyzed.layers) == ("prompt+gen", [0, 1])
    assert {feature.feature_id for feature in answer.features} <= {1, 3, 51, 40, 20}
    assert answer.features[0].top_spans
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["discover_single.json"]


def test_booleans_are_words(run, tmp_path):
    out = tmp_path / "a.json"
    flags = ["--prompt", "river", "--generate", "false", "--min_coverage", "0", "--out", str(out)]
    assert run(*flags, "--merge_across_layers", "false", "--attach_examples", "False")[0] == 0
    answer = json.loads(out.read_text())
    assert answer["analyzed"]["mode"] == "prompt"
    assert [f["rank"] for f in answer["features"]].count(1) == 2
    assert all(f["top_spans"] == [] for f in answer["features"])


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
    flags = ["--prompt", "river", "--gen_tokens", "8", "--do_sample", "true", "--min_coverage_pct", "0"]
    for name in ("a.json", "b.json"):
        assert run(*flags, "--out", str(tmp_path / name))[0] == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_extension_chooses_the_form_and_all_forms_agree(run, tmp_path):
    text = 'river, "water"\nstone; café 🙂'
    for suffix in ("json", "jsonl", "csv", "parquet"):
        flags = ["--text", text, "--min_coverage_pct", "0", "--return_top_x", "9"]
        assert run(*flags, "--out", str(tmp_path / "deep" / "er" / f"a.{suffix}"))[0] == 0
    folder = tmp_path / "deep" / "er"
    answer = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    assert records(folder / "a.jsonl") == [answer]
    features = answer["features"]
    assert len(features) == 9
    with (folder / "a.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == CSV_COLUMNS
    assert [row[0] for row in rows] == [str(f["feature_id"]) for f in features]
    for row, feature in zip(rows, features, strict=True):
        assert [float(cell) for cell in row[3:8]] == [
            feature["score"], *(feature["scores"][name] for name in ("mean", "coverage", "max", "selectivity")),
        ]  # fmt: skip
        assert (row[2], row[8], row[9]) == ("resid_post", "", feature["top_spans"][0]["text"])
    assert any('"' in row[9] and "\n" in row[9] and "," in row[9] for row in rows)
    table = pq.read_table(folder / "a.parquet").to_pylist()
    for row, feature in zip(table, features, strict=True):
        assert {k: row[k] for k in ("hook_point", "sae", "feature_id", "layer", "rank", "score", "proto_label")} == {
            k: feature[k] for k in ("hook_point", "sae", "feature_id", "layer", "rank", "score", "proto_label")
        }
        assert row["top_span_text"] == feature["top_spans"][0]["text"]


# --- batches ---

BATCH = ("--gen_tokens", "4", "--min_coverage_pct", "0", "--return_top_x", "3")


def test_a_batch_keeps_lines_order_and_ids_and_reports_bad_lines(run, prompts, tmp_path):
    out = tmp_path / "out" / "answers.jsonl"
    code, _, said = run("--prompts_file", str(prompts), *BATCH, "--out", str(out))
    assert code == 0
    assert f"{len(LINES) - len(BLANK_LINES)} prompts" in said
    assert f"{len(BAD_LINES)} errors" in said
    assert "1 lines have keys that are no options" in said
    assert "1 blank lines passed over" in said
    found = records(out)
    assert [record["line"] for record in found] == [n for n in range(1, len(LINES) + 1) if n not in BLANK_LINES]
    assert {record["line"] for record in found if "error" in record} == BAD_LINES
    ids = {record["line"]: record["id"] for record in found if "id" in record}
    assert ids == {1: "first", 3: 7, 6: "number", 7: None, 8: "nothing else", 10: ["a", 1], 11: "too long"}
    for record in found:
        if "error" in record:
            assert set(record["error"]) == {"field", "message"}
            assert "features" not in record
        else:
            Discovery.model_validate({k: v for k, v in record.items() if k not in ("line", "id")})
            assert len(record["features"]) == (1 if record["line"] == 12 else 3)
    by_line = {record["line"]: record for record in found}
    assert by_line[1]["analyzed"]["mode"] == "prompt+gen"
    assert by_line[3]["analyzed"]["mode"] == "text"
    assert by_line[3]["analyzed"]["notes"][-1].endswith("passed over: other")
    assert by_line[11]["error"]["field"] == "text"
    assert by_line[12]["analyzed"]["min_coverage"] == 0.01
    assert by_line[13]["error"] == {
        "field": "retrun_top_x",
        "message": "a line has no option retrun_top_x; did you mean return_top_x?",
    }
    assert by_line[14]["error"]["field"] == "tau"
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"], "no parts are left"


def test_a_batch_in_every_form(run, prompts, tmp_path):
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert run("--prompts_file", str(prompts), *BATCH, "--out", str(tmp_path / f"a.{suffix}"))[0] == 0
    found = records(tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == found
    keys = [(r["line"], f["feature_id"], f["score"]) for r in found for f in r.get("features", ())]
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == [*CSV_COLUMNS, "line", "id"]
    assert [(int(row[-2]), int(row[0]), float(row[3])) for row in rows] == keys
    assert {row[-1] for row in rows if row[-2] == "10"} == {'["a", 1]'}
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [(row["line"], row["feature_id"], row["score"]) for row in table] == keys


@pytest.mark.parametrize(
    "line",
    [
        rb'{"prompt": "a", "id": "\ud800"}', rb'{"prompt": "\ud800"}', b"[" * 200_000, b'{"a":' * 100_000,
        b'{"prompt": "a", "id": NaN}', b'{"prompt": "a", "id": [1e999]}', b'"' + b"a" * (9 << 20) + b'"',
        b'"a\xff"', b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", b"\x00", b'{"prompt": "a", "text": ""}',
    ],
    ids=["surrogate_id", "surrogate", "deep", "deep_object", "nan", "infinity", "huge", "latin1", "long_int", "nul",
         "both"],
)  # fmt: skip
def test_no_line_can_spoil_its_neighbours(line, run, tmp_path):
    file, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    file.write_bytes(b'"stone"\n' + line + b'\n"river"\r\n')
    code, _, said = run("--prompts_file", str(file), *BATCH, "--out", str(out))
    assert code == 0, said
    found = [json.loads(one, parse_constant=pytest.fail) for one in out.read_text(encoding="utf-8").splitlines()]
    assert [record["line"] for record in found] == [1, 2, 3]
    assert ["error" in record for record in found] == [False, True, False]


def test_a_batch_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "CHUNK_LINES", 2)
    file, whole, out = tmp_path / "p.jsonl", tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(f"river water {n}") for n in range(7)) + "\n")
    flags = ["--prompts_file", str(file), *BATCH]
    assert run(*flags, "--out", str(whole))[0] == 0

    answered: list[int] = []
    inner = flow.BatchWorker.run

    def killed(self: flow.BatchWorker, chunk: flow.Chunk) -> int:
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(chunk.number)
        return inner(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(flow.BatchWorker, "run", killed)
        assert run(*flags, "--out", str(out))[0] == 130
    assert not out.exists()
    (parts,) = (path for path in tmp_path.iterdir() if path.is_dir())
    kept = {path.name: path.read_bytes() for path in parts.glob("0*")}
    assert len(kept) == 2
    code, _, said = run(*flags, "--out", str(out))
    assert (code, "4 of them by an earlier run" in said) == (0, True)
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_parts_of_another_command_or_sae_are_not_taken(run, model_dir, sae_dirs, tmp_path, monkeypatch):
    file, out, sae = tmp_path / "p.jsonl", tmp_path / "a.jsonl", tmp_path / "sae"
    file.write_text('"river water"\n')
    shutil.copytree(sae_dirs["late"], sae)
    ours = ["--model", str(model_dir), "--sae", str(sae), "--dtype", "float32", "--prompts_file", str(file), *BATCH]

    def stopped(*flags: str) -> None:
        """Every part is there, and the file is not."""
        with monkeypatch.context() as patch:
            patch.setattr(job.answers, "write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run(*ours, *flags, "--out", str(out), model=False)[0] == 130

    stopped()
    assert "earlier run" not in run(*ours, "--score_mode", "max", "--out", str(out), model=False)[2]
    assert "earlier run" in run(*ours, "--out", str(out), model=False)[2]
    stopped()
    config = json.loads((sae / "cfg.json").read_text())
    (sae / "cfg.json").write_text(json.dumps(config | {"k": 3}))
    assert "earlier run" not in run(*ours, "--out", str(out), model=False)[2], "another SAE at the same path"


@pytest.mark.ray
def test_two_workers_write_the_bytes_of_one(run, tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [json.dumps({"prompt": f"river {n % 9} water" if n % 5 else 3, "id": n}) for n in range(300)]
    file.write_text("\n".join(rows))
    for workers in ("1", "2"):
        flags = ["--prompts_file", str(file), *BATCH, "--threads", "1", "--workers", workers]
        assert run(*flags, "--out", str(tmp_path / f"{workers}.jsonl"))[0] == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


# --- mistakes ---


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "either prompt or text"),
        (["--prompt", "a", "--text", "b"], "either prompt or text"),
        (["--prompt", ""], "prompt"),
        (["--text", "a", "--score_mode", "sum"], "score_mode"),
        (["--text", "a", "--min_coverage_pct", "50"], "min_coverage_pct"),
        (["--text", "a", "--generate", "yes"], "--generate: expected true or false, got 'yes'"),
        (["--text", "a", "--generate"], "--generate"),
        (["--text", "a", "--layers", "x"], "--layers"),
        (["--text", "a", "--layers"], "layers"),
        (["--text", "a", "--layers", "9"], "there are SAEs for layer 0 resid_post, layer 1 resid_post"),
        (["--text", "a", "--streams", "resid"], "streams"),
        (["--text", "a", "--restrict_features", "-1"], "restrict_features"),
        (["--text", "a", "--restrict_features", "5000"], "feature 5000 does not exist"),
        (["--text", "a", "--tau", "p50"], "tau"),
        (["--text", "a", "--tau", "constant:x"], "--tau"),
        (["--text", "a", "--tau", "quantile:2"], "tau"),
        (["--text", "a", "--unknown", "1"], "--unknown"),
        (["--text", "a", "--top", "3"], "--top"),
        (["--text", "a", "positional"], "positional"),
        (["--text", "a", "--out", "a.txt"], "expected one of .json, .jsonl, .csv, .parquet"),
        (["--text", "a", "--out", "/proc/none/a.json"], "cannot be written"),
        (["--text", "a", "--catalog", "/none"], "there is no catalog"),
        (["--text", "a", "--labels", "/none.jsonl"], "cannot be read"),
        (["--text", "a", "--sae", "/none"], "/none"),
        (["--text", "a", "--model", "/none"], "/none"),
        (["--text", "a", "--threads", "0"], "threads"),
        (["--text", "a", "--device", "abacus"], "device"),
        (["--text", "x" * 100], "room for 64"),
        (["--prompts_file", "/none", "--out", "a.jsonl"], "cannot be read"),
        (["--prompts_file", "/none"], "needs --out"),
        (["--prompts_file", "/none", "--text", "a", "--out", "a.jsonl"], "one of them"),
        (["--prompts_file", __file__, "--workers", "0", "--out", "a.jsonl"], "workers"),
        (["--prompts_file", __file__, "--score_mode", "sum", "--out", "a.jsonl"], "score_mode"),
        (["--prompts_file", os.devnull, "--out", "a.jsonl"], "no line"),
        (["--text", "a", "--workers", "2"], "--workers"),
        (["--text", "a", "--tau", "p95:3"], "tau.value is given"),
        (["--prompt", "a", "--temperature", "0.5"], "set do_sample=true"),
        (["--compare", "a.json", "b.json", "--text", "a"], "nothing else; leave out --model"),
        (["--text", "a", "--text", "\udcff"], "text"),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, says, run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*flags)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_does_not_echo_a_whole_prompt(run):
    code, _, err = run("--prompt", "x" * 3_000_000)
    assert code == 2
    assert len(err) < 1000


def test_help_names_every_flag_of_the_document(run):
    code, out, _ = run("--help")
    assert code == 0
    for flag in (
        "model", "sae", "prompt", "text", "prompts_file", "generate", "gen_tokens", "layers", "streams",
        "restrict_features", "topk_tokens_per_seq", "return_top_x", "score_mode", "min_coverage_pct",
        "merge_across_layers", "attach_examples", "attach_proto_labels", "seed", "out",
    ):  # fmt: skip
        assert f"--{flag} " in out


# --- the terminal ---

HOSTILE = "river \x1b[31mred\x1b]0;title\x07 [bold]x[/bold] [link=http://e.vil]y[/link] \u202ewater\x9b1m\r[/nonsense]"


@pytest.mark.parametrize("how", ["text", "prompt"])
def test_hostile_text_cannot_steer_the_terminal(how, run, tmp_path):
    labels = tmp_path / "labels.jsonl"
    rows = [{"feature_id": n, "label": f"[red]{n}[/red] \x1b[5mblink"} for n in range(96)]
    labels.write_text("\n".join(map(json.dumps, rows)))
    flags = [f"--{how}", HOSTILE, "--min_coverage_pct", "0", "--labels", str(labels), "--truncate", "true"]
    if how == "prompt":
        flags += ["--gen_tokens", "8"]
    code, out, err = run(*flags)
    assert code == 0, err
    assert "feature" in out
    assert not set("\x1b\x07\x9b\u202e\r") & set(out + err)
    assert "[red]" in out, "markup is shown, not interpreted"


def test_the_table_names_the_features_of_the_answer(run, tmp_path):
    flags = ["--text", "river water stone", "--min_coverage_pct", "0", "--return_top_x", "5"]
    assert run(*flags, "--out", str(tmp_path / "a.json"))[0] == 0
    code, out, _ = run(*flags)
    assert code == 0
    for feature in json.loads((tmp_path / "a.json").read_text())["features"]:
        assert f"{feature['layer']}/{feature['stream']}/{feature['feature_id']} " in out
    assert "tokens kept" in out
