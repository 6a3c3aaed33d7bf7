"""The events of a run: one frozen record for each kind, written as a JSON line and parsed here alone.

A line has `at` (Unix time), `event` (its kind) and the fields of the record. Whoever makes an event with a field that
its kind does not have, or without one that it needs, gets a TypeError. A reader passes over fields and kinds that newer
programs write.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegan:
    """A run has begun."""

    catalog: str
    """Or several, joined by +."""
    workers: int
    """That it asks for."""
    host: str
    pid: int
    address: str | None = None
    """Of the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBegan:
    """A stage has begun."""

    stage: str
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDone:
    """A stage has ended."""

    stage: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """A sign of life, and how far the stage is; "" before the first."""

    stage: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What was there before the run analyses anything."""

    done: int
    """Shards."""
    done_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDone:
    """The run has ended well."""

    snapshot: int | None
    """What it published, if anything."""
    is_new: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    """The run has ended with an error."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeakerPromise:
    """The file system keeps a promise of the store less well."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The cluster has no room for a worker yet."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted:
    """A worker holds what it needs."""

    worker: int
    node: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStarted:
    """A worker was given a shard."""

    shard_id: str
    tokens: int
    worker: int
    """0 in the process of the run itself."""
    node: str
    attempts: int
    """This one among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDone:
    """A shard is analysed for all its SAEs; `at` is that of its receipts."""

    shard_id: str
    host: str
    seconds: float
    numerics: dict[str, Any]
    versions: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A shard is left out."""

    shard_id: str
    kind: str
    message: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    """A worker was let go."""

    message: str
    worker: int
    node: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """A worker died or hung; its task is tried again elsewhere."""

    kind: str
    message: str
    worker: int
    attempts: int
    node: str = ""
    shard_id: str = ""
    """"" if it had no task, or one of no shard."""
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRefused:
    """A node computes other bits than the run."""

    kind: str
    message: str
    worker: int
    node: str
    attempts: int


Event = (
    RunBegan | StageBegan | StageDone | Alive | Planned | RunDone | RunFailed | WeakerPromise | Waiting | WorkerStarted
    | TaskStarted | ShardDone | Quarantined | WorkerLeft | WorkerLost | WorkerRefused
)  # fmt: skip
KINDS: dict[str, type[Event]] = {
    "run": RunBegan,
    "stage": StageBegan,
    "stage_done": StageDone,
    "alive": Alive,
    "plan": Planned,
    "done": RunDone,
    "failed": RunFailed,
    "weaker_promise": WeakerPromise,
    "waiting": Waiting,
    "worker_started": WorkerStarted,
    "task_started": TaskStarted,
    "shard_done": ShardDone,
    "quarantined": Quarantined,
    "worker_left": WorkerLeft,
    "worker_lost": WorkerLost,
    "worker_refused": WorkerRefused,
}
"""By the kind of a line."""
_ADAPTERS: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(record) for kind, record in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A line: an event, and when it was."""

    at: float
    event: Event | None
    """None: of a kind that only newer programs know."""


def line(kind: str, facts: Mapping[str, Any]) -> str:
    """A line of an event that happens now, or at the fact `at`.

    Raises:
        TypeError: if its kind has no such fact, or lacks one.
        KeyError: if there is no such kind.
    """
    told = dict(facts)
    at = told.pop("at", round(time.time(), 3))
    KINDS[kind](**told)  # what is wrong ends here; what is right is written in the order it came in
    return json.dumps({"at": at, "event": kind, **told})


def parse(text: bytes) -> Entry:
    """An entry from its line.

    Raises:
        ValueError: if it is no event, or lacks a field of its kind.
    """
    told = json.loads(text)
    if not isinstance(told, dict) or not isinstance(told.get("at"), (int, float)) or not told.get("event"):
        raise ValueError(f"{text[:80]!r} is no event; expected an object with at and event")
    at, kind = float(told["at"]), str(told["event"])
    if kind not in KINDS:
        return Entry(at, None)
    known = {field.name for field in fields(KINDS[kind])}
    return Entry(at, _ADAPTERS[kind].validate_python({name: told[name] for name in known & told.keys()}))
