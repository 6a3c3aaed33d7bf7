"""The one place that knows Ray: run tasks on workers, in this process or on actors, and survive what breaks.

Both executors have one interface: a picklable maker of workers and a list of tasks go in, outcomes come out
as they are done. `connection` reaches a cluster, `places` finds room on its nodes, `run` drives actors there,
`meters` counts for Ray's metrics.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sae_census.config import ClusterConfig
from sae_census.steps.cluster.connection import connected, uses_ray
from sae_census.steps.cluster.outcomes import Outcome, Worker, attempt
from sae_census.steps.cluster.run import Describe, OnEvent, RayRun

__all__ = ["connected", "run_tasks"]


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
    if uses_ray(settings):
        with connected(settings):
            yield from RayRun(make, tasks, settings, needs_gpu, on_event, describe, stage).outcomes(probe, judge)
        return
    worker = make()
    if probe is not None:
        judge(attempt(worker, probe).checked().outcome(probe, 1))
    for task in tasks:
        if describe(task):
            on_event("task_started", {**describe(task), "worker": 0, "node": "", "attempts": 1})
        yield attempt(worker, task).checked().outcome(task, 1)
