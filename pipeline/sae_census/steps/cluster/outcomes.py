"""Tasks and what becomes of them: workers give replies, replies become outcomes, outcomes come in some order."""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from sae_census.errors import CensusError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)


@runtime_checkable
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


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers: data only, so that no exception has to travel between processes."""

    result: Any = None
    user_error: UserError | None = None
    kind: str = ""
    message: str = ""
    details: str = ""
    warnings: tuple[str, ...] = ()
    """What libraries have warned of in the worker so far."""

    def checked(self) -> "Reply":
        """The same.

        Raises:
            UserError: if that was the answer.
        """
        if self.user_error is not None:
            raise self.user_error
        return self

    def outcome(self, task: Any, attempts: int) -> Outcome[Any, Any]:
        """Of a task, at this attempt."""
        return Outcome(
            task=task,
            result=self.result,
            kind=self.kind,
            message=self.message,
            details=self.details,
            attempts=attempts,
        )


def attempt(worker: Worker[Any, Any], task: Any) -> Reply:
    """Let a worker do a task, and answer whatever comes of it."""
    try:
        return Reply(result=worker.run(task))
    except UserError as error:
        return Reply(user_error=error)
    except Exception as error:  # noqa: BLE001  # whatever one task raises must not end the others
        details = "" if isinstance(error, CensusError) else traceback.format_exc()
        return Reply(kind=type(error).__name__, message=str(error) or repr(error), details=details)


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
