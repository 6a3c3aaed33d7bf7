"""The one place that knows Ray: run tasks on workers, in this process or on actors, and survive what breaks.

Both executors have one interface: a picklable maker of workers and a list of tasks go in, outcomes come out
as they are done. We own retries, deadlines and replacements (Ray restarts nothing behind our back):

- what the user must mend (`UserError`) ends the run at once;
- what would fail again the same way (any other exception) makes the task a failure, without a retry;
- what breaks the worker (death, hang, lost node, memory) is retried on a fresh worker; the last attempt runs
  with no neighbour, so that a bystander of somebody else's memory hunger is not blamed;
- a node that was taken back (preempted) is not the task's fault: that attempt does not count;
- a node that would compute other bits is refused, and the run goes on with the others.

Workers that no node has room for yet wait, and hold up nobody: the run goes on with those that there are.
"""

import math
import socket
import statistics
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pipeline.config import ClusterConfig
from pipeline.errors import CensusError, ConfigError, NumericsError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)
OnEvent = Callable[[str, dict[str, Any]], None]
Describe = Callable[[Any], dict[str, Any]]
_START_SECONDS = 900
_KNOCK_SECONDS = 10
_MAX_FAILED_STARTS = 3


class Worker(Protocol[TaskIn, ResultOut]):
    """Anything that turns tasks into results, one by one."""

    def run(self, task: TaskIn, /) -> ResultOut:
        """Do one task."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[Task, Result]):
    """What became of a task: a result, or a failure with its reason."""

    task: Task
    result: Result | None = None
    kind: str = ""
    """Of the failure: the exception's name, or how the worker was lost."""
    message: str = ""
    details: str = ""
    """Traceback, if there is one."""
    attempts: int = 1


def run_tasks(
    make: Callable[[], Worker[Any, Any]],
    tasks: Sequence[Any],
    settings: ClusterConfig,
    *,
    probe: Any = None,
    judge: Callable[[Outcome[Any, Any]], None] = lambda outcome: None,
    needs_gpu: bool = False,
    on_event: OnEvent = lambda kind, facts: None,
    describe: Describe = lambda task: {},
    stage: str = "",
) -> Iterator[Outcome[Any, Any]]:
    """Run every task once to an outcome; outcomes come in the order of completion.

    Args:
        make: makes a worker; called once in each worker's process. Must be picklable for Ray.
        tasks: picklable values.
        settings: executor, number of workers, retries.
        probe: a task that one worker does before any other starts.
        judge: is told its outcome, and ends the run by raising.
        needs_gpu: whether a worker takes a GPU unless the settings say otherwise.
        on_event: told when workers start, are lost or refused, and when a task that can be described starts.
        describe: names a task in events, as plain JSON; nothing: it is not worth an event. Its `tokens` are metered.
        stage: what the tasks belong to, for Ray's metrics.

    Raises:
        UserError: raised by a worker, or because the cluster has no room for one.
        CensusError: if workers cannot be started.
    """
    if not tasks:
        return
    if _uses_ray(settings):
        with connected(settings):
            yield from _RayRun(make, tasks, settings, needs_gpu, on_event, describe, stage).outcomes(probe, judge)
        return
    worker = make()
    if probe is not None:
        judge(_answered(_attempt(worker, probe)).outcome(probe, 1))
    for task in tasks:
        if describe(task):
            on_event("task_started", {**describe(task), "worker": 0, "node": "", "attempts": 1})
        yield _answered(_attempt(worker, task)).outcome(task, 1)


def _uses_ray(settings: ClusterConfig) -> bool:
    return settings.executor == "ray" or (settings.executor == "auto" and settings.workers > 1)


@contextmanager
def connected(settings: ClusterConfig) -> Iterator[None]:
    """Ray for the time of the block, if the settings want it: a private one, or a running cluster.

    Blocks nest: only the outermost connects and disconnects.

    Raises:
        ConfigError: if no cluster answers at the address.
    """
    if not _uses_ray(settings):
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    if ":" in settings.address:
        _knock(settings.address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if settings.address == "local":
            cpus = settings.workers * settings.threads_per_worker
            memory = 256 << 20  # results are small
            ray.init("local", num_cpus=cpus, object_store_memory=memory, include_dashboard=False, **quiet)
        else:
            ray.init(settings.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(_unreachable(settings.address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Where nothing listens, Ray tries for minutes and then ends the process instead of raising."""
    host, port = address.removeprefix("ray://").rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(_unreachable(address, error)) from error


def _unreachable(address: str, error: Exception) -> str:
    why = " ".join(str(error).split())[:200]
    if isinstance(error, ImportError):
        return f"cluster.address {address}: the Ray client is not installed ({why}); pip install 'ray[client]'"
    if "Initialization failure from server" in why:
        last = str(error).strip().splitlines()[-1].strip()
        return (
            f"cluster.address {address}: its client server could not open a session ({last}); try again, or start the "
            "job inside the cluster with cluster.address=auto"
        )
    if "version mismatch" in why.lower():
        return f"cluster.address {address}: the cluster runs other versions than this process ({why}); use the same"
    return f"cluster.address {address}: no Ray cluster answers there ({why}); start one or use local"


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a worker answers: data only, so that no exception has to travel between processes."""

    result: Any = None
    user_error: UserError | None = None
    kind: str = ""
    message: str = ""
    details: str = ""

    def outcome(self, task: Any, attempts: int) -> Outcome[Any, Any]:
        return Outcome(
            task=task,
            result=self.result,
            kind=self.kind,
            message=self.message,
            details=self.details,
            attempts=attempts,
        )


def _attempt(worker: Worker[Any, Any], task: Any) -> _Reply:
    try:
        return _Reply(result=worker.run(task))
    except UserError as error:
        return _Reply(user_error=error)
    except Exception as error:  # noqa: BLE001  # whatever one task raises must not end the others
        details = "" if isinstance(error, CensusError) else traceback.format_exc()
        return _Reply(kind=type(error).__name__, message=str(error) or repr(error), details=details)


def _answered(reply: _Reply) -> _Reply:
    if reply.user_error is not None:
        raise reply.user_error
    return reply


class _Host:
    """The actor's class: makes the worker in its own process."""

    def node(self) -> str:
        """The id of the node it was placed on; answered as soon as it is."""
        import ray

        found: str = ray.get_runtime_context().get_node_id()
        return found

    def start(self, make: Callable[[], Worker[Any, Any]]) -> _Reply:
        try:
            self._worker = make()
        except UserError as error:
            return _Reply(user_error=error)
        except Exception as error:  # noqa: BLE001  # the driver decides what a failed start means
            return _Reply(kind=type(error).__name__, message=str(error), details=traceback.format_exc())
        return _Reply()

    def run(self, task: Any) -> _Reply:
        return _attempt(self._worker, task)


@dataclass(slots=True)
class _Job:
    task: Any
    attempts: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class _Hired:
    """An actor, and where it is."""

    number: int
    actor: Any
    node: str = ""
    """Empty until it is placed."""


@dataclass(slots=True)
class _Flight:
    """A call in flight: a job, or placing and starting a worker if there is none."""

    worker: _Hired
    job: _Job | None
    deadline: float
    began: float = field(default_factory=time.monotonic)


class _Meters:
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
        for state, number in (("waiting", waiting), ("running", running)):
            self._now.set(number, self._stage | {"state": state})
        for state, number in (("placed", workers), ("wanted", wanted)):
            self._workers.set(number, self._stage | {"state": state})

    def count(self, outcome: Outcome[Any, Any], tokens: int, seconds: float) -> None:
        failed = outcome.result is None
        self._ended.inc(1, self._stage | {"state": "failed" if failed else "done"})
        self._seconds.inc(max(seconds, 1e-9), self._stage)
        if tokens and not failed:
            self._tokens.inc(tokens, self._stage)

    def lose(self) -> None:
        self._lost.inc(1, self._stage)


class _RayRun:
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
        self._gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(needs_gpu)
        self._todo = deque(_Job(task) for task in tasks)
        self._solo: deque[_Job] = deque()
        self._flights: dict[Any, _Flight] = {}
        self._idle: list[_Hired] = []
        self._seconds: list[float] = []
        self._failed_starts = 0
        self._num_hired = 0
        self._refused: dict[str, NumericsError] = {}
        self._homeless_since: float | None = None
        self._make = ray.put(make)
        self._meters = _Meters(stage)

    def outcomes(self, probe: Any, judge: Callable[[Outcome[Any, Any]], None]) -> Iterator[Outcome[Any, Any]]:
        """Drive the run; its actors are gone afterwards, however it ends."""
        try:
            self._start()
            if probe is not None:
                tasks, self._todo = self._todo, deque([_Job(probe)])
                judge(next(self._until_done(proven=False)))
                self._todo = tasks
            yield from self._until_done(proven=probe is not None)
        finally:
            for worker in [*self._idle, *(flight.worker for flight in self._flights.values())]:
                self._ray.kill(worker.actor)
            self._idle, self._flights = [], {}
            self._meter()

    def _until_done(self, *, proven: bool) -> Iterator[Outcome[Any, Any]]:
        """Outcomes of all that is to do. Until a worker has proved that it starts, there is only one."""
        while self._todo or self._solo or self._busy():
            if proven:
                self._grow()
            self._check_capacity()
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
        placed = len(self._idle) + sum(bool(flight.worker.node) for flight in self._flights.values())
        waiting = len(self._todo) + len(self._solo)
        self._meters.show(waiting=waiting, running=self._busy(), workers=placed, wanted=self._settings.workers)

    def _busy(self) -> int:
        return sum(flight.job is not None for flight in self._flights.values())

    def _check_capacity(self) -> None:
        """An actor that fits nowhere would wait for ever without an error.

        While there is a worker, others may wait. If there is none, a node must fit, or come before the wait is over.
        """
        if self._idle or any(flight.worker.node for flight in self._flights.values()) or self._fits():
            self._homeless_since = None
            return
        now = time.monotonic()
        need = f"{self._settings.threads_per_worker:g} CPUs and {self._gpus:g} GPUs"
        if self._homeless_since is None:
            self._homeless_since = now
            if self._settings.wait_for_resources_seconds:
                self._on_event("waiting", {"message": f"a worker needs {need}, and no node has them yet"})
        if now - self._homeless_since < self._settings.wait_for_resources_seconds:
            return
        if self._refused:
            raise next(iter(self._refused.values()))
        have = self._ray.cluster_resources()
        raise ConfigError(
            f"a worker needs {need} on one node, and no node of the cluster has them (together "
            f"{have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs); lower cluster.threads_per_worker or "
            "cluster.gpus_per_worker, or set cluster.wait_for_resources_seconds if nodes are still to come"
        )

    def _fits(self) -> bool:
        need = {"CPU": float(self._settings.threads_per_worker), "GPU": self._gpus}
        return any(
            node["Alive"]
            and node["NodeID"] not in self._refused
            and all(node["Resources"].get(name, 0) >= amount for name, amount in need.items())
            for node in self._ray.nodes()
        )

    def _start(self) -> None:
        host = self._ray.remote(max_restarts=0, max_task_retries=0)(_Host)
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(self._refused))})"} if self._refused else {}
        options = {"num_cpus": self._settings.threads_per_worker, "num_gpus": self._gpus, "label_selector": elsewhere}
        worker = _Hired(number=self._num_hired, actor=host.options(**options).remote())
        self._num_hired += 1
        self._flights[worker.actor.node.remote()] = _Flight(worker, None, math.inf)

    def _grow(self) -> None:
        alive = len(self._idle) + len(self._flights)
        wanted = min(self._settings.workers, len(self._todo) + self._busy() or 1)
        for _ in range(wanted - alive):
            self._start()

    def _submit(self) -> None:
        while self._todo and self._idle:
            self._send(self._idle.pop(), self._todo.popleft())
        if self._solo and self._idle and not self._todo and not self._busy():
            self._send(self._idle.pop(), self._solo.popleft())

    def _send(self, worker: _Hired, job: _Job) -> None:
        job.attempts += 1
        usual = statistics.median(self._seconds) if self._seconds else 0
        limit = self._settings.deadline_seconds or max(300.0, 20 * usual)
        if not self._seconds and self._settings.deadline_seconds is None:
            limit = 3600.0  # nothing is known yet of how long a task takes
        self._flights[worker.actor.run.remote(job.task)] = _Flight(worker, job, time.monotonic() + limit)
        if self._describe(job.task):
            self._on_event("task_started", self._facts(worker, job))

    def _facts(self, worker: _Hired, job: _Job | None) -> dict[str, Any]:
        about = self._describe(job.task) if job else {}
        return {**about, "worker": worker.number, "node": worker.node, "attempts": job.attempts if job else 0}

    def _settle(self, ref: Any, flight: _Flight) -> Outcome[Any, Any] | None:
        worker = flight.worker
        try:
            reply: Any = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:  # death, unavailability, memory, lost object or node
            if getattr(error, "preempted", False) and flight.job is not None:
                flight.job.attempts -= 1
            told = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            return self._lost(flight, type(error).__name__, " … ".join(dict.fromkeys((told[0], told[-1]))))
        if not worker.node:
            worker.node = reply
            deadline = time.monotonic() + _START_SECONDS
            self._flights[worker.actor.start.remote(self._make)] = _Flight(worker, None, deadline)
            return None
        if flight.job is None and isinstance(reply.user_error, NumericsError):
            self._refuse(worker, reply.user_error)
            return None
        _answered(reply)
        if flight.job is None:
            if reply.kind:
                raise CensusError(f"a worker cannot start: {reply.kind}: {reply.message}\n{reply.details}")
            self._failed_starts = 0
            self._on_event("worker_started", self._facts(worker, None))
            self._idle.append(worker)
            return None
        self._idle.append(worker)
        seconds = time.monotonic() - flight.began
        self._seconds.append(seconds)
        done: Outcome[Any, Any] = reply.outcome(flight.job.task, flight.job.attempts)
        self._meters.count(done, self._describe(done.task).get("tokens", 0), seconds)
        return done

    def _refuse(self, worker: _Hired, error: NumericsError) -> None:
        """Do without a node; if it was the only one that fits, the next look at the capacity ends the run."""
        self._ray.kill(worker.actor)
        self._meters.lose()
        self._refused[worker.node] = error
        self._on_event("worker_refused", {"kind": "NumericsError", "message": str(error), **self._facts(worker, None)})
        if not self._flights and not self._idle:
            self._start()

    def _lost(self, flight: _Flight, kind: str, message: str) -> Outcome[Any, Any] | None:
        """A worker is gone or must go: replace it, and give its task another chance if it has one."""
        self._ray.kill(flight.worker.actor)  # "unavailable" may still be running
        self._meters.lose()
        job = flight.job
        if job is None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise CensusError(f"workers die while they start ({kind}: {message}); is there memory for the model?")
        self._on_event("worker_lost", {"kind": kind, "message": message, **self._facts(flight.worker, job)})
        if not self._flights and not self._idle:
            self._start()
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
