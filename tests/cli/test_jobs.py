"""What people type: overrides, exit codes, and one helpful line for every mistake."""

import json
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import Cli
from hydra.core.global_hydra import GlobalHydra

from sae_census.cli import JOBS, main
from sae_census.flows.catalog.reader import Catalog
from sae_census.records import Receipt

# Hydra leaves the handling of its log files to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def base(model_dir: Path, sae_dirs: dict[str, Path], corpus_dir: Path, tmp_path: Path) -> list[str]:
    return [
        f"model.id={model_dir}",
        "model.dtype=float32",
        f"saes=[{{path: {sae_dirs['late']}, hook_point: blocks.1.hook_resid_post}}]",
        f"corpus.source={corpus_dir}/*.jsonl",
        "corpus.context_length=16",
        "corpus.shard_tokens=320",
        f"store.root={tmp_path / 'runs'}",
        "catalog.name=mine",
        "cluster.threads_per_worker=1",
    ]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("door", ["command", "checkout"])
def test_every_job_starts_and_explains_its_keys(
    name: str, door: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["sae-census", name, "--help"] if door == "command" else ["door", "--help"])
    start = main if door == "command" else partial(runpy.run_module, f"jobs.{name}", run_name="__main__")
    with pytest.raises(SystemExit) as left:
        start()
    assert left.value.code in (0, None)
    out = capsys.readouterr().out
    assert "store:" in out or "out:" in out or "--out" in out


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_the_bare_command_lists_every_job_with_a_line(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sae-census", *argv])
    runpy.run_module("jobs", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(JOBS)
    assert all(len(line.split()) > 3 for line in lines[2:])


def test_a_job_that_is_none_is_one_line_with_the_nearest(cli: Cli) -> None:
    assert cli("analyse") == (2, "", "error: 'analyse' is no job; did you mean analyze?\n")


def test_a_catalog_is_made_planned_verified_and_left_alone_when_nothing_changed(
    cli: Cli, base: list[str], tmp_path: Path
) -> None:
    code, out, _ = cli("plan", *base)
    assert code == 0
    assert "of which 0 are prepared" in out
    assert not (tmp_path / "runs").exists()
    code, out, err = cli("analyze", *base)
    assert code == 0, err
    catalog = Catalog(tmp_path / "runs", "mine")
    assert str(catalog.folder) in out
    assert catalog.digest in out
    assert "preflight blocks.1.hook_resid_post/late: FVU" in err
    assert "3 records are not used (1 empty, 1 missing_column, 1 not_json)" in err
    code, out, _ = cli("analyze", *base)
    assert code == 0
    assert "(unchanged)" in out
    assert "0 tokens left" in cli("plan", *base)[1]
    code, out, _ = cli("verify", f"store.root={tmp_path / 'runs'}", "recompute=2")
    assert code == 0
    assert "2 shards recomputed, 0 wrong" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_verify_names_every_damaged_file_and_the_next_run_mends_the_partial(
    cli: Cli, base: list[str], tmp_path: Path
) -> None:
    cli("analyze", *base)
    root = tmp_path / "runs"
    digest = Catalog(root, "mine").digest
    damaged = [
        next(root.glob("measures/*/partials/*.zip")),
        next(root.glob("corpora/*/shards/*.parquet")),
        root / "catalogs/mine/000001/features.parquet",
    ]
    for path in damaged:
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    code, _, err = cli("verify", f"store.root={root}")
    assert code == 3
    for path in damaged:
        assert path.name in err
    shutil.rmtree(root / "catalogs/mine/000001")
    assert cli("analyze", *base)[0] == 0
    assert cli("verify", f"store.root={root}")[0] == 0
    assert Catalog(root, "mine").digest == digest


def test_failed_shards_are_listed_the_rest_is_safe_and_the_exit_code_says_so(
    cli: Cli, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_census.errors import ShardError
    from sae_census.steps.census.shard import Analyzer, ShardTask

    honest = Analyzer.run
    refused: list[str] = []

    def refuse_one(self: Analyzer, task: ShardTask) -> tuple[Receipt, ...]:
        if not refused or task.shard.shard_id in refused:
            refused.append(task.shard.shard_id)
            raise ShardError("activations at blocks.1 are NaN at context 0, position 3")
        return honest(self, task)

    monkeypatch.setattr(Analyzer, "run", refuse_one)
    code, _, err = cli("analyze", *base)
    assert code == 3
    assert "is left out: ShardError: activations at blocks.1 are NaN" in err
    catalog = Catalog(tmp_path / "runs", "mine")
    assert catalog.manifest.coverage.missing == tuple(refused)
    assert not catalog.manifest.coverage.complete
    monkeypatch.setattr(Analyzer, "run", honest)
    assert cli("analyze", *base)[0] == 0
    assert Catalog(tmp_path / "runs", "mine").manifest.coverage.complete


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["corpus.source=nowhere.jsonl"], "corpus.source nowhere.jsonl does not exist; expected a file, a glob"),
        (["corpus.source=*.jsonl"], "corpus.source *.jsonl matches no file"),
        (["corpus.column=body"], "has no column 'body'; it has 'id', 'text'; set corpus.column"),
        (["corpus.max_bad_records=1"], "3 records cannot be used (1 empty, 1 missing_column, 1 not_json), more than"),
        (["corpus.contextlength=3"], "corpus.contextlength is not known; did you mean corpus.context_length?"),
        (["corpus.context_length=no"], "corpus.context_length is 'no': Input should be a valid integer"),
        (["corpus.context_length=65"], "the model has only 64 positions; choose a shorter one"),
        (["masks.positions=[16]"], "masks name positions outside a context, which has 0 to 15"),
        (["model.id=/no/such/dir"], "model.id /no/such/dir does not exist"),
        (["saes=[{path: /no/such/sae}]"], "SAE path /no/such/sae does not exist"),
        (["saes=[]"], "expected at least one SAE"),
        (["saes=[{path: embedded:resid_post_7, hook_point: blocks.1.hook_resid_post}]"], "is 576 wide, but"),
        (["saes.0.hook_point=blocks.7.hook_resid_post"], "asks for layer 7, but the model has layers 0 to 2"),
        (["saes.0.hook_point=blocks.0.hook_nothing"], "'blocks.0.hook_nothing' is not known; expected blocks."),
        (["catalog.name=../x"], "catalog.name is '../x'"),
        (["model.device=cuda"], "no CUDA device is available; use model.device=cpu"),
    ],
)
def test_every_mistake_is_one_line_and_exit_code_2(
    cli: Cli, base: list[str], overrides: list[str], sentence: str
) -> None:
    code, _, err = cli("analyze", *base, *overrides)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in err


def test_damaged_checkpoints_are_named(cli: Cli, base: list[str], model_dir: Path, tmp_path: Path) -> None:
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    shutil.copy(model_dir / "config.json", hollow)
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    fake = tmp_path / "fake.gguf"
    fake.write_text("not weights")
    for model_id, sentence in (
        (hollow, "has no weights; expected model.safetensors"),
        (broken, "no model could be loaded from"),
        (fake, "is not a GGUF file"),
    ):
        code, _, err = cli("analyze", *base, f"model.id={model_id}")
        assert (code, sentence in err) == (2, True), err


def test_a_catalog_refuses_other_settings_by_the_name_of_the_field(cli: Cli, base: list[str]) -> None:
    assert cli("analyze", *base)[0] == 0
    for override, field in (
        ("corpus.context_length=12", "preparation.context_length was 16, now 12"),
        ("masks.first_positions=1", "measure.masks.first_positions was 0, now 1"),
        ("batch.contexts=8", "measure.batch_contexts was 32, now 8"),
    ):
        code, _, err = cli("analyze", *base, override)
        assert (code, field in err) == (2, True), err
    assert cli("analyze", *base, "ranking.score=max")[0] == 0


def test_a_poor_fit_is_refused_with_its_numbers_when_asked(cli: Cli, base: list[str]) -> None:
    code, _, err = cli("analyze", *base, "preflight=refuse", "corpus.bos=never")
    assert code == 2
    assert "the fit is " in err
    assert "FVU" in err


def test_multirun_makes_one_catalog_for_each_choice(cli: Cli, base: list[str], tmp_path: Path) -> None:
    code, _, err = cli("analyze", *base[:-2], "cluster.threads_per_worker=1", "catalog.name=a,b", "-m")
    assert code == 0, err
    assert Catalog(tmp_path / "runs", "a").digest == Catalog(tmp_path / "runs", "b").digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


@pytest.mark.parametrize("source", ["{one: [%s/notes.jsonl], two: %s/prose.jsonl}", "[%s/notes.jsonl, %s/prose.jsonl]"])
def test_sources_may_be_many_or_named(cli: Cli, base: list[str], corpus_dir: Path, tmp_path: Path, source: str) -> None:
    code, _, err = cli("analyze", *base, "corpus.source=" + source.replace("%s", str(corpus_dir)), "preflight=off")
    assert code == 0, err
    slices = Catalog(tmp_path / "runs", "mine").manifest.coverage.slices
    assert sorted(slices) == (["one", "two"] if source.startswith("{") else ["all"])


def test_events_of_a_run_are_json_lines(cli: Cli, base: list[str], tmp_path: Path) -> None:
    cli("analyze", *base)
    lines = next(tmp_path.glob("runs/events/*.jsonl")).read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in lines]
    assert kinds[0] == "run"
    assert kinds[-1] == "done"
    assert "shard_done" in kinds
