"""The one place that knows Ray: run tasks on workers, in this process or on actors, and survive what breaks.

Both executors have one interface: a picklable maker of workers and a list of tasks go in, outcomes come out
as they are done. We own retries, deadlines and replacements (Ray restarts nothing behind our back):

- what the user must mend (`UserError`) ends the run at once;
- what would fail again the same way (any other exception) makes the task a failure, without a retry;
- what breaks the worker (death, hang, lost node, memory) is retried on a fresh worker; the last attempt runs
  with no neighbour, so that a bystander of somebody else's memory hunger is not blamed.
"""

import statistics
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pipeline.config import ClusterConfig
from pipeline.errors import CensusError, ConfigError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)
OnEvent = Callable[[str, dict[str, Any]], None]
_START_SECONDS = 900
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
) -> Iterator[Outcome[Any, Any]]:
    """Run every task once to an outcome; outcomes come in the order of completion.

    Args:
        make: makes a worker; called once in each worker's process. Must be picklable for Ray.
        tasks: picklable values.
        settings: executor, number of workers, retries.
        probe: a task that one worker does before any other starts.
        judge: is told its outcome, and ends the run by raising.
        needs_gpu: whether a worker takes a GPU unless the settings say otherwise.
        on_event: told of retries and lost workers.

    Raises:
        UserError: raised by a worker, or because the cluster has no room for one.
        CensusError: if workers cannot be started.
    """
    if not tasks:
        return
    if _uses_ray(settings):
        with connected(settings):
            yield from _RayRun(make, tasks, settings, needs_gpu, on_event).outcomes(probe, judge)
        return
    worker = make()
    if probe is not None:
        judge(_answered(_attempt(worker, probe)).outcome(probe, 1))
    for task in tasks:
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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if settings.address == "local":
            cpus = settings.workers * settings.threads_per_worker
            memory = 256 << 20  # results are small
            ray.init("local", num_cpus=cpus, object_store_memory=memory, include_dashboard=False, **quiet)
        else:
            ray.init(settings.address, **quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"cluster.address {settings.address}: no Ray cluster answers there ({error}); start one or use local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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


@dataclass(slots=True)
class _Flight:
    """A call in flight: a job, or a start if there is none."""

    actor: Any
    job: _Job | None
    deadline: float
    began: float = field(default_factory=time.monotonic)


class _RayRun:
    """One run over actors."""

    def __init__(
        self,
        make: Callable[[], Worker[Any, Any]],
        tasks: Sequence[Any],
        settings: ClusterConfig,
        needs_gpu: bool,
        on_event: OnEvent,
    ):
        import ray

        self._ray = ray
        self._settings, self._on_event = settings, on_event
        self._gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(needs_gpu)
        self._todo = deque(_Job(task) for task in tasks)
        self._solo: deque[_Job] = deque()
        self._flights: dict[Any, _Flight] = {}
        self._idle: list[Any] = []
        self._seconds: list[float] = []
        self._failed_starts = 0
        self._make = ray.put(make)

    def outcomes(self, probe: Any, judge: Callable[[Outcome[Any, Any]], None]) -> Iterator[Outcome[Any, Any]]:
        """Drive the run; its actors are gone afterwards, however it ends."""
        try:
            self._check_capacity()
            self._start()
            if probe is not None:
                tasks, self._todo = self._todo, deque([_Job(probe)])
                judge(next(self._until_done(proven=False)))
                self._todo = tasks
            yield from self._until_done(proven=probe is not None)
        finally:
            for actor in [*self._idle, *(flight.actor for flight in self._flights.values())]:
                self._ray.kill(actor)

    def _until_done(self, *, proven: bool) -> Iterator[Outcome[Any, Any]]:
        """Outcomes of all that is to do. Until a worker has proved that it starts, there is only one."""
        while self._todo or self._solo or any(flight.job for flight in self._flights.values()):
            if proven:
                self._grow()
            self._submit()
            ready, _ = self._ray.wait(list(self._flights), num_returns=1, timeout=1.0)
            for ref in ready:
                outcome = self._settle(ref, self._flights.pop(ref))
                proven = proven or bool(self._idle)
                if outcome is not None:
                    yield outcome
            yield from self._expire()

    def _check_capacity(self) -> None:
        """An actor that fits nowhere would wait for ever without an error."""
        need = {"CPU": float(self._settings.threads_per_worker), "GPU": self._gpus}
        if not any(all(node["Resources"].get(k, 0) >= v for k, v in need.items()) for node in self._ray.nodes()):
            have = self._ray.cluster_resources()
            raise ConfigError(
                f"a worker needs {need['CPU']:g} CPUs and {need['GPU']:g} GPUs on one node, and no node of the cluster "
                f"has them (together {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs); lower "
                "cluster.threads_per_worker or cluster.gpus_per_worker"
            )

    def _start(self) -> None:
        host = self._ray.remote(max_restarts=0, max_task_retries=0)(_Host)
        actor = host.options(num_cpus=self._settings.threads_per_worker, num_gpus=self._gpus).remote()
        self._flights[actor.start.remote(self._make)] = _Flight(actor, None, time.monotonic() + _START_SECONDS)

    def _grow(self) -> None:
        alive = len(self._idle) + len(self._flights)
        wanted = min(self._settings.workers, len(self._todo) + len(self._flights) or 1)
        for _ in range(wanted - alive):
            self._start()

    def _submit(self) -> None:
        while self._todo and self._idle:
            self._send(self._idle.pop(), self._todo.popleft())
        if self._solo and self._idle and not self._todo and not any(f.job for f in self._flights.values()):
            self._send(self._idle.pop(), self._solo.popleft())

    def _send(self, actor: Any, job: _Job) -> None:
        job.attempts += 1
        usual = statistics.median(self._seconds) if self._seconds else 0
        limit = self._settings.deadline_seconds or max(300.0, 20 * usual)
        if not self._seconds and self._settings.deadline_seconds is None:
            limit = 3600.0  # nothing is known yet of how long a task takes
        self._flights[actor.run.remote(job.task)] = _Flight(actor, job, time.monotonic() + limit)

    def _settle(self, ref: Any, flight: _Flight) -> Outcome[Any, Any] | None:
        try:
            reply: _Reply = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:  # death, unavailability, memory, lost object or node
            return self._lost(flight, type(error).__name__, str(error).splitlines()[0])
        _answered(reply)
        if flight.job is None:
            if reply.kind:
                raise CensusError(f"a worker cannot start: {reply.kind}: {reply.message}\n{reply.details}")
            self._failed_starts = 0
            self._idle.append(flight.actor)
            return None
        self._idle.append(flight.actor)
        self._seconds.append(time.monotonic() - flight.began)
        return reply.outcome(flight.job.task, flight.job.attempts)

    def _lost(self, flight: _Flight, kind: str, message: str) -> Outcome[Any, Any] | None:
        """A worker is gone or must go: replace it, and give its task another chance if it has one."""
        self._ray.kill(flight.actor)  # "unavailable" may still be running
        job = flight.job
        if job is None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise CensusError(f"workers die while they start ({kind}: {message}); is there memory for the model?")
        self._on_event("worker_lost", {"kind": kind, "message": message, "attempts": job.attempts if job else 0})
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
