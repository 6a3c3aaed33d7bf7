"""What became of a list of tasks: outcomes in the order of tasks, and their results or a reason."""

from collections.abc import Iterator
from typing import Any

from pipeline.errors import CensusError
from pipeline.steps.cluster import Outcome


def result_of(outcome: Outcome[Any, Any], what: str) -> Any:
    """The result of a task that nothing can do without.

    Args:
        outcome: of the task.
        what: it was about, for the message.

    Raises:
        CensusError: if it failed.
    """
    if outcome.result is None:
        raise CensusError(f"{what} failed: {outcome.kind}: {outcome.message}\n{outcome.details}")
    return outcome.result


def in_order(tasks: list[Any], outcomes: Iterator[Outcome[Any, Any]]) -> Iterator[Outcome[Any, Any]]:
    """Outcomes in the order of tasks, whatever order they come in."""
    waiting: dict[Any, Outcome[Any, Any]] = {}
    wanted = iter(tasks)
    task = next(wanted, None)
    for outcome in outcomes:
        waiting[outcome.task] = outcome
        while task in waiting:
            yield waiting.pop(task)
            task = next(wanted, None)
