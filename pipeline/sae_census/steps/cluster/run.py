"""Drive actors through a list of tasks. Retries, deadlines and replacements are ours: Ray restarts nothing.

- what the user must mend (`UserError`) ends the run at once;
- what would fail again the same way (any other exception) makes the task a failure, without a retry;
- what breaks the worker (death, hang, lost node, memory) is retried on a fresh worker; the last attempt runs
  with no neighbour, so that a bystander of somebody else's memory hunger is not blamed;
- a node that was taken back (preempted) is not the task's fault: that attempt does not count;
- a node that would compute other bits is refused, and the run goes on with the others;
- a node that is about to leave gets no more tasks, if there are others.

Workers that no node has room for yet wait, and hold up nobody: the run goes on with those that there are.
"""

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_census.config import ClusterConfig
from sae_census.errors import CensusError, NumericsError
from sae_census.io.loading import library_warnings
from sae_census.steps.cluster.meters import Meters
from sae_census.steps.cluster.outcomes import Outcome, Worker
from sae_census.steps.cluster.places import PlacedActor, Places

OnEvent = Callable[[str, dict[str, Any]], None]
Describe = Callable[[Any], dict[str, Any]]
_START_SECONDS = 900
_MAX_FAILED_STARTS = 3


@dataclass(slots=True)
class _Job:
    task: Any
    attempts: int = 0


@dataclass(slots=True)
class _Flight:
    """A call in flight: a job, or placing and starting a worker if there is none."""

    worker: PlacedActor
    job: _Job | None
    deadline: float
    began: float = field(default_factory=time.monotonic)


class RayRun:
    """One run over actors."""

    def __init__(
        self,
        make: Callable[[], Worker[Any, Any]],
        tasks: Sequence[Any],
        settings: ClusterConfig,
        needs_gpu: bool,
        on_event: OnEvent,
        describe: Describe,
        stage: str,
    ):
        import ray

        self._ray = ray
        self._settings, self._on_event, self._describe = settings, on_event, describe
        self._todo = deque(_Job(task) for task in tasks)
        self._solo: deque[_Job] = deque()
        self._flights: dict[Any, _Flight] = {}
        self._idle: list[PlacedActor] = []
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)
        self._failed_starts = 0
        self._make = ray.put(make)
        self._places, self._meters = Places(settings, needs_gpu), Meters(stage)

    def outcomes(self, probe: Any, judge: Callable[[Outcome[Any, Any]], None]) -> Iterator[Outcome[Any, Any]]:
        """Drive the run; its actors are gone afterwards, however it ends."""
        try:
            if probe is not None:
                tasks, self._todo = self._todo, deque([_Job(probe)])
                judge(next(self._until_done(proven=False)))
                self._todo = tasks
            yield from self._until_done(proven=probe is not None)
        finally:
            self._places.close()
            self._idle, self._flights = [], {}
            self._meter()

    def _until_done(self, *, proven: bool) -> Iterator[Outcome[Any, Any]]:
        """Outcomes of all that is to do. Until a worker has proved that it starts, there is one of a class."""
        while self._todo or self._solo or self._busy():
            self._let_go()
            self._grow(proven)
            self._submit()
            ready, _ = self._ray.wait(list(self._flights), num_returns=1, timeout=1.0)
            for ref in ready:
                outcome = self._settle(ref, self._flights.pop(ref))
                proven = proven or bool(self._idle)
                if outcome is not None:
                    yield outcome
            yield from self._expire()
            self._meter()

    def _meter(self) -> None:
        waiting = len(self._todo) + len(self._solo)
        self._meters.show(
            waiting=waiting, running=self._busy(), workers=self._places.num_placed, wanted=self._settings.num_workers
        )

    def _busy(self) -> int:
        return sum(flight.job is not None for flight in self._flights.values())

    def _let_go(self) -> None:
        """What is on a node that leaves may finish its task, and gets no other."""
        for worker in self._places.leaving():
            if worker in self._idle:
                self._idle.remove(worker)
                self._places.stop(worker)
                self._on_event("worker_left", {"message": "its node is to be taken back", **self._facts(worker, None)})

    def _grow(self, proven: bool) -> None:
        for worker in self._places.grow(len(self._todo) + self._busy() if proven else None):
            self._flights[worker.handle.node.remote()] = _Flight(worker, None, math.inf)
        if message := self._places.await_room():
            self._on_event("waiting", {"message": message})

    def _submit(self) -> None:
        while self._todo and self._idle:
            self._send(self._idle.pop(), self._todo.popleft())
        if self._solo and self._idle and not self._todo and not self._busy():
            self._send(self._idle.pop(), self._solo.popleft())

    def _send(self, worker: PlacedActor, job: _Job) -> None:
        job.attempts += 1
        deadline = time.monotonic() + self._limit(self._seconds[worker.kind])
        self._flights[worker.handle.run.remote(job.task)] = _Flight(worker, job, deadline)
        if self._describe(job.task):
            self._on_event("task_started", self._facts(worker, job))

    def _limit(self, seconds: list[float]) -> float:
        """How long a task may take, after what others took on workers of the same class."""
        if self._settings.deadline_seconds is not None:
            return self._settings.deadline_seconds
        return max(300.0, 20 * statistics.median(seconds)) if seconds else 3600.0

    def _facts(self, worker: PlacedActor, job: _Job | None) -> dict[str, Any]:
        about = self._describe(job.task) if job else {}
        return {**about, "worker": worker.number, "node": worker.node, "attempts": job.attempts if job else 0}

    def _settle(self, ref: Any, flight: _Flight) -> Outcome[Any, Any] | None:
        worker = flight.worker
        try:
            reply: Any = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:  # death, unavailability, memory, lost object or node
            if getattr(error, "preempted", False) and flight.job is not None:
                flight.job.attempts -= 1
            lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            return self._lost(flight, type(error).__name__, " … ".join(dict.fromkeys((lines[0], lines[-1]))))
        if not worker.node:
            worker.node = reply
            deadline = time.monotonic() + _START_SECONDS
            self._flights[worker.handle.start.remote(self._make)] = _Flight(worker, None, deadline)
            return None
        if flight.job is None and isinstance(reply.user_error, NumericsError):
            self._refuse(worker, reply.user_error)
            return None
        for text in reply.warnings:  # nobody reads what a worker writes to its own stderr
            library_warnings.pass_on(text)
        reply.checked()
        if flight.job is None:
            if reply.kind:
                raise CensusError(f"a worker cannot start: {reply.kind}: {reply.message}\n{reply.details}")
            self._failed_starts = 0
            self._on_event("worker_started", self._facts(worker, None))
            self._idle.append(worker)
            return None
        self._idle.append(worker)
        seconds = time.monotonic() - flight.began
        self._seconds[worker.kind].append(seconds)
        done: Outcome[Any, Any] = reply.outcome(flight.job.task, flight.job.attempts)
        self._meters.count(done, self._describe(done.task).get("tokens", 0), seconds)
        return done

    def _refuse(self, worker: PlacedActor, error: NumericsError) -> None:
        """Do without a node; if it was the only one that fits, the next look at the capacity ends the run."""
        self._places.stop(worker)
        self._meters.lose()
        self._places.refuse(worker.node, error)
        self._on_event("worker_refused", {"kind": "NumericsError", "message": str(error), **self._facts(worker, None)})

    def _lost(self, flight: _Flight, kind: str, message: str) -> Outcome[Any, Any] | None:
        """A worker is gone or must go: replace it, and give its task another chance if it has one."""
        self._places.stop(flight.worker)  # "unavailable" may still be running
        self._meters.lose()
        job = flight.job
        # A node that leaves cancels what was on its way to it; while others work, that is no failed start.
        if job is None and (flight.worker.node or not self._places.num_placed):
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise CensusError(f"workers die while they start ({kind}: {message}); is there memory for the model?")
        self._on_event("worker_lost", {"kind": kind, "message": message, **self._facts(flight.worker, job)})
        if job is None:
            return None
        if job.attempts >= self._settings.max_attempts:
            return Outcome(task=job.task, kind=kind, message=message, attempts=job.attempts)
        last = job.attempts + 1 == self._settings.max_attempts
        (self._solo if last else self._todo).append(job)
        return None

    def _expire(self) -> Iterator[Outcome[Any, Any]]:
        now = time.monotonic()
        for ref, flight in list(self._flights.items()):
            if now > flight.deadline:
                del self._flights[ref]
                outcome = self._lost(flight, "Deadline", f"no answer after {now - flight.began:.0f} s")
                if outcome is not None:
                    yield outcome
