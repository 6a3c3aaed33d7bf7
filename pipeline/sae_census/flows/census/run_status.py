"""What is told of a run of `sae-census analyze`: values, and what of them strangers may see."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

State = Literal["running", "finished", "failed", "interrupted", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why something is not as it should be."""

    shard_id: str
    kind: str
    message: str
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A shard that takes far longer than others did."""

    shard_id: str
    worker: int
    node: str
    seconds: float
    median_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run."""

    run_id: str
    catalog: str
    """Or several, joined by +: a run that only made partials for them."""
    state: State
    """silent: no sign of life, so probably killed; what it finished is safe."""
    reason: str
    """Why it failed or was interrupted."""
    host: str
    pid: int
    began_at: float
    """Unix time, as all times here."""
    seen_at: float
    """Its last word."""
    stage: str
    stage_done: int
    stage_total: int
    shards_planned: int
    """Of the corpus; 0 until the run has planned."""
    shards_before: int
    """Done by earlier runs."""
    shards_done: int
    """By this run."""
    shards_running: int
    shards_waiting: int
    tokens_planned: int
    tokens_before: int
    tokens_done: int
    tokens_per_second: float | None
    """Of this run, since its first shard began."""
    seconds_left: float | None
    """Until all shards are analysed, at that rate."""
    worker_seconds: float
    """Spent on shards: done, running, failed and lost; loading of models is not in it."""
    workers: int
    """That hold a model now, or did when the run was last heard of; 0 if the run works in its own process."""
    workers_wanted: int
    lost: tuple[Reason, ...]
    """Workers that died, hung or were refused."""
    failures: tuple[Reason, ...]
    """Shards that are left out."""
    stragglers: tuple[Straggler, ...]
    snapshot: int | None
    """What it published, if anything."""
    num_damaged: int
    """Lines of its events, or its plan, that cannot be read: then the numbers above lack something."""

    def public(self) -> "RunStatus":
        """Without what may name paths or machines: reasons are the kinds of errors, not their messages."""
        return replace(
            self,
            host="",
            pid=0,
            reason=self.reason.split(":")[0],
            lost=tuple(replace(item, message="") for item in self.lost),
            failures=tuple(replace(item, message="") for item in self.failures),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
