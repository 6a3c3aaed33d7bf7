"""Ray's metrics of a run."""

from typing import Any

from sae_census.steps.cluster.outcomes import Outcome


class Meters:
    """Ray's metrics of a run; they appear where Ray shows its own, under `ray_census_…`."""

    def __init__(self, stage: str):
        from ray.util.metrics import Counter, Gauge

        by_stage, by_state = ("stage",), ("stage", "state")
        self._now = Gauge("census_tasks", "tasks that wait or run (shards, in analyze)", by_state)
        self._workers = Gauge("census_workers", "workers that are placed on a node, and wanted", by_state)
        self._ended = Counter("census_tasks_ended", "tasks that are done, or have failed", by_state)
        self._lost = Counter("census_workers_lost", "workers that died, hung or were refused", by_stage)
        self._tokens = Counter("census_tokens", "tokens of tasks that are done", by_stage)
        self._seconds = Counter("census_task_seconds", "time spent on tasks that have ended", by_stage)
        self._stage = {"stage": stage}

    def show(self, *, waiting: int, running: int, workers: int, wanted: int) -> None:
        """How things stand: tasks by state, and workers."""
        for state, number in (("waiting", waiting), ("running", running)):
            self._now.set(number, self._stage | {"state": state})
        for state, number in (("placed", workers), ("wanted", wanted)):
            self._workers.set(number, self._stage | {"state": state})

    def count(self, outcome: Outcome[Any, Any], tokens: int, seconds: float) -> None:
        """A task has ended; its tokens count if it is done."""
        failed = outcome.result is None
        self._ended.inc(1, self._stage | {"state": "failed" if failed else "done"})
        self._seconds.inc(max(seconds, 1e-9), self._stage)
        if tokens and not failed:
            self._tokens.inc(tokens, self._stage)

    def lose(self) -> None:
        """A worker is gone."""
        self._lost.inc(1, self._stage)
