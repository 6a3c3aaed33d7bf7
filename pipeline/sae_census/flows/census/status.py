"""What runs of `sae-census analyze` are doing or did, told from the store alone.

Nothing is asked of the run itself, so anybody who can read the store can look, and a killed run can still be told.
Shards of a run are counted by its events and, for those that its last seconds did not get to write, by receipts.
"""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from sae_census.config.status import StatusConfig
from sae_census.errors import CensusError, ConfigError, CorruptError
from sae_census.flows.census.run_status import Reason, RunStatus, State, Straggler
from sae_census.io.store import json_lines
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Receipt
from sae_census.steps.store import events, layout
from sae_census.steps.store.events import (
    Alive,
    Entry,
    Planned,
    Quarantined,
    RunBegan,
    RunDone,
    RunFailed,
    ShardDone,
    StageBegan,
    StageDone,
    TaskStarted,
    WorkerLeft,
    WorkerLost,
    WorkerRefused,
    WorkerStarted,
)
from sae_census.steps.store.progress import BEAT_SECONDS

_MIN_FOR_MEDIAN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a run is taken for dead, and a shard for slow."""

    silent_seconds: float = 6 * BEAT_SECONDS
    """A run that gave no sign of life for so long is taken for dead."""
    straggler_ratio: float = 3.0
    """A shard straggles if it takes more than so many medians, …"""
    straggler_seconds: float = 10.0
    """… and longer than this."""


LIMITS = Limits()


def status(config: StatusConfig, limits: Limits = LIMITS) -> list[RunStatus]:
    """The newest runs, newest first.

    Args:
        config: which store, which catalog, how many runs.
        limits: when a run is taken for dead, and a shard for slow.

    Raises:
        ConfigError: if there is no store, or no run in it that fits.
    """
    blobs = LocalBlobs(config.store.root)
    if not blobs.path(layout.events("x")).parent.is_dir():
        raise ConfigError(f"store.root {config.store.root} holds no runs; give the root of an analysis")
    fitting = (run for run in runs(blobs, limits) if config.catalog is None or config.catalog in run.catalog.split("+"))
    found = list(islice(fitting, config.last))
    if not found:
        what = f" of catalog {config.catalog}" if config.catalog else ""
        raise ConfigError(f"store.root {config.store.root} tells of no run{what}")
    return found


def runs(blobs: LocalBlobs, limits: Limits = LIMITS) -> Iterator[RunStatus]:
    """All runs of a store, newest first."""
    names = {path.name.split(".")[0] for path in blobs.path(layout.events("x")).parent.glob("*.jsonl")}
    for run_id in sorted(names, reverse=True):
        run = _Run(blobs, run_id, limits)
        if run.began:
            yield run.status(run.began, time.time())


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A task that runs."""

    at: float
    """When it began."""
    task: TaskStarted


class _Run:
    """What the events of one run say, in their order."""

    def __init__(self, blobs: LocalBlobs, run_id: str, limits: Limits):
        self._blobs, self._run_id, self._limits = blobs, run_id, limits
        self.began: RunBegan | None = None
        self.began_at = self.planned_at = self.seen_at = 0.0
        self.end: RunDone | RunFailed | None = None
        self.stage = Alive()
        self.plan = Planned(done=0, done_tokens=0)
        self.first_shard_at = self.last_shard_at = 0.0
        self.running: dict[str, _Attempt] = {}
        self.seconds: dict[str, float] = {}
        self.spent = 0.0
        self.workers: set[int] = set()
        self.lost: list[Reason] = []
        self.failures: list[Reason] = []
        self.num_damaged = 0
        for line in _lines(blobs, layout.events(run_id)):
            try:
                entry = events.parse(line)
            except ValueError:
                self.num_damaged += 1
                continue
            self._take(entry)
        self.left: dict[str, int] = {}
        self._measure_ids: list[str] = []
        if self.planned_at:
            try:
                intent = json.loads(blobs.get(layout.run_plan(run_id)))
                self.left, self._measure_ids = dict(intent["left"]), list(intent["measures"])
            except (ValueError, LookupError, TypeError, CorruptError):
                self.num_damaged += 1

    def _take(self, entry: Entry) -> None:
        self.seen_at = max(self.seen_at, entry.at)
        match entry.event:
            case RunBegan():
                self.began, self.began_at = entry.event, entry.at
            case StageBegan(stage=stage, total=total):  # every stage has workers of its own
                self.stage = Alive(stage=stage, total=total)
                self.workers = set()
            case Alive(stage=stage) if stage:
                self.stage = entry.event
            case StageDone():
                self.stage = replace(self.stage, done=self.stage.total)
            case Planned():
                self.plan, self.planned_at = entry.event, entry.at
            case RunDone() | RunFailed():
                self.end = entry.event
            case _:
                self._take_work(entry)

    def _take_work(self, entry: Entry) -> None:
        match entry.event:
            case WorkerStarted(worker=worker):
                self.workers.add(worker)
            case TaskStarted(shard_id=shard_id):
                self.running[shard_id] = _Attempt(entry.at, entry.event)
                self.first_shard_at = self.first_shard_at or entry.at
            case ShardDone(shard_id=shard_id, seconds=seconds):
                self._over(shard_id, entry.at)
                self.seconds[shard_id] = seconds
            case Quarantined() as event:
                self._over(event.shard_id, entry.at)
                self.failures.append(_reason(event, event.shard_id))
            case WorkerLeft(worker=worker):
                self.workers.discard(worker)
            case WorkerLost() as event:
                self._over(event.shard_id, entry.at)
                self.workers.discard(event.worker)
                self.lost.append(_reason(event, event.shard_id))
            case WorkerRefused() as event:
                self.workers.discard(event.worker)
                self.lost.append(_reason(event, ""))

    def _over(self, shard_id: str, at: float) -> None:
        """An attempt has ended: what it took is spent, whatever came of it."""
        started = self.running.pop(shard_id, None)
        if started is not None:
            self.spent += max(0.0, at - started.at)
            self.last_shard_at = max(self.last_shard_at, at)

    def status(self, run: RunBegan, now: float) -> RunStatus:
        """As of a time; what runs in a run that is over, or silent, stopped at its last word."""
        state = self._state(now)
        until = now if state == "running" else self.seen_at
        if state != "finished":
            self._count_receipts()
        tokens_done = sum(self.left[shard_id] for shard_id in self.seconds if shard_id in self.left)
        out = {failure.shard_id for failure in self.failures}
        tokens_left = sum(
            n for shard_id, n in self.left.items() if shard_id not in self.seconds and shard_id not in out
        )
        began = self.first_shard_at or until
        last = until if tokens_left else self.last_shard_at
        rate = tokens_done / (last - began) if tokens_done and last > began else None
        shards = {shard_id: attempt for shard_id, attempt in self.running.items() if shard_id in self.left}
        running = shards if state == "running" else {}
        spent = self.spent + sum(until - attempt.at for attempt in self.running.values())
        num_left = len(self.left) - len(self.seconds) - len(out)
        return RunStatus(
            run_id=self._run_id,
            catalog=run.catalog,
            state=state,
            reason=self._reason(),
            host=run.host,
            pid=run.pid,
            began_at=self.began_at,
            seen_at=self.seen_at,
            stage=self.stage.stage,
            stage_done=self.stage.done,
            stage_total=self.stage.total,
            shards_planned=len(self.left) + self.plan.done,
            shards_before=self.plan.done,
            shards_done=len(self.seconds),
            shards_running=len(running),
            shards_waiting=num_left - len(running),
            tokens_planned=sum(self.left.values()) + self.plan.done_tokens,
            tokens_before=self.plan.done_tokens,
            tokens_done=tokens_done,
            tokens_per_second=rate,
            seconds_left=tokens_left / rate if rate and tokens_left and state == "running" else None,
            worker_seconds=spent,
            workers=len(self.workers),
            workers_wanted=run.workers,
            lost=tuple(self.lost),
            failures=tuple(self.failures),
            stragglers=self._stragglers(running, now),
            snapshot=self.end.snapshot if isinstance(self.end, RunDone) else None,
            num_damaged=self.num_damaged,
        )

    def _reason(self) -> str:
        """Why it failed."""
        return ": ".join(filter(None, (self.end.kind, self.end.message))) if isinstance(self.end, RunFailed) else ""

    def _state(self, now: float) -> State:
        match self.end:
            case RunDone():
                return "finished"
            case RunFailed(kind="KeyboardInterrupt"):
                return "interrupted"
            case RunFailed():
                return "failed"
        return "running" if now - self.seen_at < self._limits.silent_seconds else "silent"

    def _count_receipts(self) -> None:
        """Add shards that were committed in the last seconds, before an event could say so."""
        there = set(self.left) - set(self.seconds)
        for measure_id in self._measure_ids:
            there &= {path.stem for path in self._blobs.path(layout.receipts(measure_id)).glob("*.json")}
        for shard_id in sorted(there):
            keys = [layout.receipt(measure_id, shard_id) for measure_id in self._measure_ids]
            try:
                found = [Receipt.read(self._blobs.get(key), key).ran for key in keys]
            except CensusError:
                continue  # damaged: it will be analysed again
            ran = max(found, key=lambda one: one["at"])
            if self.planned_at <= ran["at"] <= self.seen_at + self._limits.silent_seconds:
                self._over(shard_id, ran["at"])
                self.seconds[shard_id] = ran["seconds"]
                self.seen_at = max(self.seen_at, ran["at"])

    def _stragglers(self, running: dict[str, _Attempt], now: float) -> tuple[Straggler, ...]:
        if len(self.seconds) < _MIN_FOR_MEDIAN:
            return ()
        usual = statistics.median(self.seconds.values())
        slow = {k: now - e.at for k, e in running.items()}
        return tuple(
            Straggler(
                shard_id=shard_id,
                worker=running[shard_id].task.worker,
                node=running[shard_id].task.node,
                seconds=seconds,
                median_seconds=usual,
            )
            for shard_id, seconds in sorted(slow.items(), key=lambda item: (-item[1], item[0]))
            if seconds > max(self._limits.straggler_ratio * usual, self._limits.straggler_seconds)
        )


def _reason(event: Quarantined | WorkerLost | WorkerRefused, shard_id: str) -> Reason:
    return Reason(shard_id=shard_id, kind=event.kind, message=event.message, attempts=event.attempts)


def _lines(blobs: LocalBlobs, first: str) -> Iterator[bytes]:
    """Of all files of a run's events."""
    number = 0
    while blobs.exists(layout.next_file(first, number)):
        yield from json_lines.lines(blobs.get(layout.next_file(first, number)))
        number += 1
