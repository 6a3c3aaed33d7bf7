"""Scheduled runs: when they are due, what they record, and what raises an alarm."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import Cli, MakeConfig, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sae_census.compute.census import due
from sae_census.config import SweepConfig
from sae_census.config.sweep import AlertConfig, EntryConfig
from sae_census.errors import ConfigError, CorruptError
from sae_census.flows.census.sweep import is_due, sweep
from sae_census.io.store import tables
from sae_census.records import Receipt
from sae_census.steps.census.shard import Analyzer, ShardTask

MONDAY = datetime(2026, 3, 2, 3, 0, tzinfo=UTC)
MOMENTS = st.datetimes(datetime(2025, 1, 1), datetime(2027, 1, 1)).map(lambda moment: moment.replace(tzinfo=UTC))


@given(last=MOMENTS, now=MOMENTS, hours=st.integers(1, 400))
def test_a_period_is_due_when_it_has_passed(last: datetime, now: datetime, hours: int) -> None:
    assert due.every_is_due(timedelta(hours=hours), last, now) == (now.timestamp() - last.timestamp() >= hours * 3600)


@given(
    last=MOMENTS, minutes=st.integers(0, 60 * 24 * 20), zone=st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kolkata"])
)
def test_a_schedule_is_due_once_a_time_of_it_has_passed(last: datetime, minutes: int, zone: str) -> None:
    """Weekly, Mondays at 03:00 of the zone: found by walking over every minute."""
    last = last.replace(second=0, microsecond=0)
    now = last + timedelta(minutes=minutes)

    def strikes(moment: datetime) -> bool:
        local = moment.astimezone(ZoneInfo(zone))
        return local.weekday() == 0 and (local.hour, local.minute) == (3, 0)

    walked = any(strikes(last + timedelta(minutes=m)) for m in range(1, minutes + 1))
    assert due.cron_is_due("0 3 * * 1", zone, last, now) == walked


def test_a_first_run_is_due_and_missed_ticks_are_one_run() -> None:
    weekly = EntryConfig(cron="0 3 * * 1")
    assert is_due(weekly, None, MONDAY)
    assert not is_due(weekly, MONDAY, MONDAY + timedelta(days=6, hours=23))
    late = MONDAY + timedelta(days=24)
    assert is_due(weekly, MONDAY, late)
    assert not is_due(weekly, late, late + timedelta(days=2))


def test_daylight_saving_neither_skips_nor_doubles_a_day() -> None:
    daily = EntryConfig(cron="30 2 * * *", timezone="Europe/Berlin")
    before = datetime(2026, 3, 28, 12, tzinfo=ZoneInfo("Europe/Berlin"))  # at 02:00 the next day clocks go to 03:00
    assert not is_due(daily, before, datetime(2026, 3, 29, 0, 59, tzinfo=UTC))
    assert is_due(daily, before, datetime(2026, 3, 29, 1, 0, tzinfo=UTC))
    autumn = datetime(2026, 10, 25, 2, 30, tzinfo=timezone(timedelta(hours=2)))  # at 03:00 clocks go back to 02:00
    assert not is_due(daily, autumn, datetime(2026, 10, 25, 2, 30, tzinfo=timezone(timedelta(hours=1))))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"every": "1d", "cron": "0 3 * * 1"},
        {"every": "0d"},
        {"every": "weekly"},
        {"cron": "0 3 * *"},
        {"every": "1d", "timezone": "Mars/Olympus"},
        {"every": "1d", "alerts": [{"statistic": "rank_correlation"}]},
        {"every": "1d", "alerts": [{"statistic": "mood", "above": 1}]},
    ],
)
def test_rules_that_are_none_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EntryConfig.model_validate(entry)


@pytest.fixture
def weekly(tmp_path: Path, analyze_config: MakeConfig) -> Callable[..., SweepConfig]:
    """A sweep over `tmp_path/text`, into which text arrives."""
    (tmp_path / "text").mkdir()
    write_corpus(tmp_path / "text" / "week_1.jsonl", seed=11, num_documents=20)
    plain = analyze_config(tmp_path / "store", corpus={"source": str(tmp_path / "text" / "*.jsonl")})
    keys = plain.model_dump(mode="json", exclude={"store", "catalog"})

    def make(**entries: Any) -> SweepConfig:
        return SweepConfig.model_validate(
            {"store": {"root": str(tmp_path / "store")}, "shared": keys, "entries": entries}
        )

    return make


def test_three_weeks_with_text_arriving_in_between(tmp_path: Path, weekly: Callable[..., SweepConfig]) -> None:
    alerts = [AlertConfig(statistic="rank_correlation", below=1.0), AlertConfig(statistic="overlap_100", below=0)]
    config = weekly(mine={"every": "1w", "alerts": [alert.model_dump() for alert in alerts]})
    said: list[str] = []
    runs = [sweep(config, MONDAY + timedelta(days=days), said.append) for days in (0, 3, 7)]
    assert [[run.status for run in tick] for tick in runs] == [["done"], [], ["unchanged"]]
    assert "mine: not due (last run 2026-03-02 03:00 UTC)" in said
    write_corpus(tmp_path / "text" / "week_3.jsonl", seed=12, num_documents=20)
    grown = sweep(config, MONDAY + timedelta(days=14), said.append)[0]
    assert (grown.status, grown.snapshot) == ("done", 2)
    assert set(grown.statistics) == {
        "rank_correlation", "overlap_100", "dead_share_change", "frequency_shift", "fvu_change",
    }  # fmt: skip
    assert len(grown.alerts) == 1
    assert grown.alerts[0].startswith("rank_correlation is 0.")
    ledger = tables.read(tmp_path / "store" / "sweeps" / "sweeps.parquet").to_pylist()
    assert [row["status"] for row in ledger] == ["done", "unchanged", "done"]
    assert ledger[2]["digest"] == grown.digest


def test_entries_that_differ_in_their_saes_share_forward_passes(
    tmp_path: Path, weekly: Callable[..., SweepConfig], sae_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is read once, and each entry's catalog is what it is alone."""
    passes: list[str] = []
    honest = Analyzer.run

    def counted(self: Analyzer, task: ShardTask) -> tuple[Receipt, ...]:
        passes.append(task.shard.shard_id)
        return honest(self, task)

    monkeypatch.setattr(Analyzer, "run", counted)
    saes = {name: {"saes": [{"path": str(path), "name": "mine"}]} for name, path in sae_dirs.items()}
    config = weekly(**{name: {"every": "1w", "config": keys} for name, keys in saes.items()})
    said: list[str] = []
    runs = sweep(config, MONDAY, said.append)
    assert [(run.entry, run.status) for run in runs] == [("early", "done"), ("late", "done")]
    assert len(passes) == len(set(passes)) > 3
    assert "early, late: share their forward passes" in said
    together, passes[:] = {run.entry: run.digest for run in runs}, []
    assert sweep(config, MONDAY + timedelta(days=7), said.append)[0].status == "unchanged"
    assert passes == []
    for name in sae_dirs:
        alone = config.model_dump() | {"store": {"root": str(tmp_path / name)}, "only": (name,)}
        (run,) = sweep(SweepConfig.model_validate(alone), MONDAY, said.append)
        assert run.digest == together[name]


def test_a_damaged_record_of_the_ledger_is_named(tmp_path: Path, weekly: Callable[..., SweepConfig]) -> None:
    config = weekly(mine={"every": "1w"})
    sweep(config, MONDAY, lambda line: None)
    (record,) = (tmp_path / "store").glob("sweeps/runs/mine/*.json")
    record.write_text("[")
    with pytest.raises(CorruptError, match=f"{record.name} is damaged: remove it"):
        sweep(config, MONDAY, lambda line: None)


def test_entries_that_cannot_share_run_each_alone(
    tmp_path: Path, weekly: Callable[..., SweepConfig], sae_dirs: dict[str, Path]
) -> None:
    bad = {"every": "1w", "config": {"saes": [{"path": str(tmp_path / "no_sae")}]}}
    good = {"every": "1w", "config": {"saes": [{"path": str(sae_dirs["late"])}]}}
    said: list[str] = []
    runs = sweep(weekly(bad=bad, good=good), MONDAY, said.append)
    assert [(run.entry, run.status) for run in runs] == [("bad", "failed"), ("good", "done")]
    assert any(line.startswith("bad, good: cannot share") for line in said)


def test_a_failed_entry_stops_no_other_and_is_tried_again(tmp_path: Path, weekly: Callable[..., SweepConfig]) -> None:
    lost = {"every": "1w", "config": {"corpus": {"source": str(tmp_path / "nowhere.jsonl")}}}
    config = weekly(bad=lost, good={"every": "1w"})
    runs = sweep(config, MONDAY, lambda line: None)
    assert [(run.entry, run.status) for run in runs] == [("bad", "failed"), ("good", "done")]
    assert "nowhere.jsonl" in runs[0].message
    write_corpus(tmp_path / "nowhere.jsonl", seed=13, num_documents=20)
    later = sweep(config, MONDAY + timedelta(hours=1), lambda line: None)
    assert [(run.entry, run.status) for run in later] == [("bad", "done")]


def test_a_wrong_key_of_an_entry_stops_everything_before_it_starts(weekly: Callable[..., SweepConfig]) -> None:
    config = weekly(good={"every": "1w"}, bad={"every": "1w", "config": {"corpus": {"context_lenght": 4}}})
    with pytest.raises(ConfigError, match=r"entry bad: corpus\.context_lenght"):
        sweep(config, MONDAY, lambda line: None)


def test_alarms_have_an_exit_code_and_a_line_for_a_webhook(
    tmp_path: Path, weekly: Callable[..., SweepConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    from sae_census.cli.sweep import ALERT, job

    config = weekly(mine={"every": "1w", "alerts": [{"statistic": "rank_correlation", "below": 1.0}]})
    assert job(config) == 0
    write_corpus(tmp_path / "text" / "more.jsonl", seed=12, num_documents=20)
    capsys.readouterr()
    assert job(config.model_copy(update={"force": True})) == ALERT
    said = json.loads(capsys.readouterr().out)
    assert said["text"].startswith("SAE Census: mine drifted: rank_correlation is ")
    assert said["entry"] == "mine"


def test_a_file_describes_the_sweep_and_the_command_line_goes_before_it(
    tmp_path: Path, weekly: Callable[..., SweepConfig]
) -> None:
    whole = weekly(mine={"every": "1w"}, other={"every": "1w"}).model_dump(mode="json", exclude={"file"})
    file = tmp_path / "weekly.yaml"
    file.write_text(json.dumps(whole))  # JSON is YAML
    runs = sweep(SweepConfig(file=str(file), only=("other",)), MONDAY, lambda line: None)
    assert [(run.entry, run.status) for run in runs] == [("other", "done")]
    file.write_text("entries: {mine: {every: never}}")
    with pytest.raises(ConfigError, match=r"weekly\.yaml: entries\.mine"):
        sweep(SweepConfig(file=str(file)), MONDAY, lambda line: None)
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        sweep(SweepConfig(file=str(tmp_path / "missing.yaml")), MONDAY, lambda line: None)


# Hydra leaves the handling of its log files to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_command_runs_a_file(tmp_path: Path, weekly: Callable[..., SweepConfig], cli: Cli) -> None:
    file = tmp_path / "weekly.yaml"
    file.write_text(weekly(mine={"every": "1w"}).model_dump_json(exclude={"file", "store"}))
    code, _, err = cli("sweep", f"file={file}", f"store.root={tmp_path / 'elsewhere'}")
    assert code == 0, err
    assert (tmp_path / "elsewhere" / "sweeps" / "sweeps.parquet").exists()
