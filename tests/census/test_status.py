"""What runs did and do is told from the store alone: finished, failed, killed and live ones, by anybody."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

from sae_census.cli.serve import _offer_status, _offer_status_page
from sae_census.cli.status import text
from sae_census.config import StatusConfig
from sae_census.errors import ConfigError, ShardError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.run_status import RunStatus
from sae_census.flows.census.status import LIMITS, Limits, runs, status
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census.shard import Analyzer
from sae_census.steps.store import events, layout
from sae_census.steps.store.progress import RunLog

MakeConfig = Callable[..., Any]


def look(root: Path, limits: Limits = LIMITS, **settings: Any) -> RunStatus:
    return status(StatusConfig(store={"root": str(root)}, **settings), limits)[0]


def test_a_finished_run_is_told_as_its_catalog_tells_it(analyze_config: MakeConfig, tmp_path: Path) -> None:
    done = analyze(analyze_config(tmp_path, catalog={"name": "mine"}), lambda line: None)
    run = look(tmp_path)
    shards = done.catalog.manifest.shards
    assert (run.state, run.catalog, run.snapshot, run.reason) == ("finished", "mine", 1, "")
    assert run.shards_planned == run.shards_done == len(shards)
    assert run.tokens_planned == run.tokens_done == sum(shard.num_tokens for shard in shards)
    assert (run.shards_before, run.shards_running, run.shards_waiting) == (0, 0, 0)
    assert (run.failures, run.lost, run.stragglers, run.seconds_left) == ((), (), (), None)
    receipts = [json.loads(path.read_bytes()) for path in tmp_path.glob("measures/*/receipts/*.json")]
    seconds = {receipt["shard"]["shard_id"]: receipt["ran"]["seconds"] for receipt in receipts}  # alike for both SAEs
    assert run.worker_seconds == pytest.approx(sum(seconds.values()), abs=0.1 * len(seconds))
    assert run.tokens_per_second is not None
    assert run.tokens_per_second > 0
    assert f"{len(shards)}/{len(shards)} done" in text(run, time.time())
    again = analyze(analyze_config(tmp_path, catalog={"name": "mine"}), lambda line: None)
    assert not again.is_new
    run = look(tmp_path)
    assert (run.shards_before, run.shards_done, run.tokens_per_second) == (len(shards), 0, None)
    assert len(list(runs(LocalBlobs(tmp_path)))) == 2


def test_a_failed_shard_is_listed_with_its_reason(
    analyze_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bad = Analyzer.run, []

    def run(self: Analyzer, task: Any) -> Any:
        bad.append(task.shard.shard_id)
        if len(bad) == 3:
            raise ShardError("of\nno \x1b[31muse")
        return whole(self, task)

    monkeypatch.setattr(Analyzer, "run", run)
    analyze(analyze_config(tmp_path), lambda line: None)
    found = look(tmp_path)
    (failure,) = found.failures
    assert (failure.shard_id, failure.kind, failure.attempts) == (bad[2], "ShardError", 1)
    assert found.shards_done == found.shards_planned - 1
    assert found.shards_waiting == 0
    assert f"shard {bad[2]}: ShardError: of↩no �[31muse" in text(found, time.time())
    assert found.to_json()["failures"][0]["message"] == "of\nno \x1b[31muse"
    assert found.public().to_json()["failures"][0]["message"] == ""


def test_a_run_that_raises_or_is_interrupted_says_why(
    analyze_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, state in ((KeyboardInterrupt(), "interrupted"), (ConfigError("mend me"), "failed")):

        def run(self: Analyzer, task: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(Analyzer, "run", run)
        root = tmp_path / state
        with pytest.raises(type(error)):
            analyze(analyze_config(root), lambda line: None)
        found = look(root)
        assert (found.state, found.shards_done, found.shards_running) == (state, 0, 0)
        assert found.reason == ": ".join(filter(None, (type(error).__name__, str(error))))


SLOW = """
import sys, time
from pathlib import Path
from sae_census.config import AnalyzeConfig
from sae_census.flows.census.analyze import analyze
from sae_census.steps.store import progress
from sae_census.steps.census.shard import Analyzer
progress.BEAT_SECONDS = 0.1
run, tries = Analyzer.run, []
def slow(self, shard):
    tries.append(shard)
    if len(tries) == 5:
        time.sleep(600)
    return run(self, shard)
Analyzer.run = slow
analyze(AnalyzeConfig.model_validate_json(Path(sys.argv[1]).read_text()), print)
"""


def test_a_live_run_is_seen_from_outside_and_a_killed_one_falls_silent(
    analyze_config: MakeConfig, tmp_path: Path
) -> None:
    config, root = analyze_config(tmp_path / "runs"), tmp_path / "runs"
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", SLOW, str(tmp_path / "config.json")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
        try:
            found = None
            while found is None or found.shards_running == 0 or found.shards_done < 4:
                assert driver.poll() is None
                found = next(runs(LocalBlobs(root)), None)
            before = found.seen_at
            while look(root).seen_at == before:  # it beats although nothing gets done
                time.sleep(0.05)
            assert (found.state, found.shards_done, found.shards_running) == ("running", 4, 1)
            assert found.pid == driver.pid
            assert found.shards_waiting == found.shards_planned - 5
            assert found.seconds_left is not None
            hasty = Limits(straggler_ratio=0.0, straggler_seconds=0.0)
            (slow,) = look(root, hasty).stragglers
            assert slow.seconds > 0
            assert f"slow       shard {slow.shard_id} on worker 0" in text(look(root, hasty), time.time())
        finally:
            driver.send_signal(signal.SIGKILL)
    found = look(root, Limits(silent_seconds=0.0))
    assert (found.state, found.shards_done, found.shards_running, found.seconds_left) == ("silent", 4, 0, None)
    assert "the same command goes on where it stopped" in text(found, time.time())
    done = analyze(config, lambda line: None)
    assert look(root).shards_before == 4
    assert look(root).snapshot == done.catalog.number


def test_shards_that_no_event_tells_of_are_counted_by_their_receipts(
    analyze_config: MakeConfig, tmp_path: Path
) -> None:
    analyze(analyze_config(tmp_path), lambda line: None)
    (events,) = tmp_path.glob("events/*.jsonl")
    whole = look(tmp_path)
    lines = events.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"shard_done"' in line)
    lost = [line for line in lines[last + 1 :] if '"done"' not in line and '"stage' not in line]
    events.write_text("\n".join([*lines[: last - 3], *lost]) + "\n")  # the tail was never written
    assert sum('"shard_done"' in line for line in events.read_text().splitlines()) < whole.shards_done
    cut = look(tmp_path)
    assert (cut.shards_done, cut.tokens_done) == (whole.shards_done, whole.tokens_done)
    receipt = next(iter(sorted(tmp_path.glob("measures/*/receipts/*.json"))))
    for damaged in tmp_path.glob("measures/*/receipts/*.json"):
        damaged.write_text("{")
    assert receipt.exists()
    assert look(tmp_path).shards_done < whole.shards_done


def test_damaged_lines_of_events_are_counted_and_the_rest_is_told(analyze_config: MakeConfig, tmp_path: Path) -> None:
    analyze(analyze_config(tmp_path), lambda line: None)
    (events,) = tmp_path.glob("events/*.jsonl")
    whole, lines = look(tmp_path), events.read_bytes().splitlines()
    broken = [
        b"{oops",
        b"[]",
        b'{"at": 1}',
        b'{"event": "run", "at": 1}',
        b"\xff\x00",
        b'{"at": null, "event": "plan"}',
    ]
    events.write_bytes(b"\n".join([lines[0], *broken, *lines[1:]]))
    cut = look(tmp_path)
    assert (cut.num_damaged, cut.shards_done, cut.state) == (len(broken), whole.shards_done, "finished")
    assert "6 lines of its events" in text(cut, time.time())
    (plan,) = tmp_path.glob("plans/*.json")
    plan.write_text("{")
    assert look(tmp_path).num_damaged == len(broken) + 1
    events.write_bytes(b"\x00" * 100)
    with pytest.raises(ConfigError, match="tells of no run"):
        look(tmp_path)


def test_every_line_of_a_run_is_an_event_that_is_read_back_whole(analyze_config: MakeConfig, tmp_path: Path) -> None:
    analyze(analyze_config(tmp_path), lambda line: None)
    (file,) = tmp_path.glob("events/*.jsonl")
    kinds = set()
    for line in file.read_bytes().splitlines():
        told, entry = json.loads(line), events.parse(line)
        kinds.add(told["event"])
        assert entry.event is not None
        assert told.items() <= {"at": entry.at, "event": told["event"], **asdict(entry.event)}.items()
    assert {"run", "stage", "stage_done", "plan", "task_started", "shard_done", "done"} <= kinds


@pytest.mark.parametrize("facts", [{}, {"snapshot": 1}, {"snapshot": 1, "is_new": True, "more": 1}])
def test_an_event_without_a_field_of_its_kind_or_with_another_is_refused_by_its_writer(facts: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        events.line("done", facts)


def test_fields_and_kinds_of_newer_programs_are_passed_over() -> None:
    newer = events.parse(b'{"at": 2, "event": "done", "snapshot": 3, "is_new": true, "more": 1}')
    assert newer == events.Entry(2.0, events.RunDone(snapshot=3, is_new=True))
    assert events.parse(b'{"at": 2, "event": "other"}') == events.Entry(2.0, None)


def test_full_event_files_are_followed_by_the_next(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    log = RunLog(blobs, layout.events("r"), lambda line: None, file_bytes=200)
    with log.running({"catalog": "c", "workers": 1}):
        for number in range(20):
            log.event("worker_lost", {"kind": "Death", "message": "", "worker": number, "attempts": 0})
    assert len(list(tmp_path.glob("events/r*.jsonl"))) > 5
    (run,) = runs(blobs)
    assert len(run.lost) == 20
    assert all(len(path.read_bytes()) < 1000 for path in tmp_path.glob("events/*"))


def test_no_store_and_no_fitting_run_are_said(analyze_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no runs"):
        look(tmp_path)
    analyze(analyze_config(tmp_path), lambda line: None)
    with pytest.raises(ConfigError, match="tells of no run of catalog other"):
        look(tmp_path, catalog="other")
    assert os.path.commonpath([tmp_path]) not in json.dumps(look(tmp_path).public().to_json())


def test_the_server_tells_the_status_as_json_and_as_a_page_without_paths(
    analyze_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Analyzer, task: Any) -> Any:
        raise ConfigError(f"<b>{tmp_path}</b>")

    with monkeypatch.context() as patch:
        patch.setattr(Analyzer, "run", run)
        with pytest.raises(ConfigError):
            analyze(analyze_config(tmp_path, catalog={"name": "mine"}), lambda line: None)
    api = FastAPI()
    routes = APIRouter()
    _offer_status(routes, str(tmp_path))
    _offer_status_page(api.router, str(tmp_path / "empty"))
    api.include_router(routes, prefix="/v1")
    with TestClient(api) as client:
        (told,) = client.get("/v1/status").json()
        assert (told["state"], told["reason"], told["catalog"]) == ("failed", "ConfigError", "mine")
        assert "no runs yet" in client.get("/status").text
    events = next(tmp_path.glob("events/*.jsonl"))
    events.write_text(events.read_text().replace('"mine"', '"<script>x</script>"'))
    page = FastAPI()
    _offer_status_page(page.router, str(tmp_path))
    with TestClient(page) as client:
        body = client.get("/status").text
    assert "&lt;script&gt;x" in body
    assert "<script" not in body
    assert str(tmp_path) not in body
