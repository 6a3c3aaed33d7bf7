"""Where actors may be: what one takes of a node, which nodes are refused, and how long to wait for one that fits."""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config import ClusterConfig
from pipeline.errors import ConfigError, NumericsError, UserError
from pipeline.steps.outcomes import Reply, Worker, attempt


class _Host:
    """The actor's class: makes the worker in its own process."""

    def node(self) -> str:
        """The id of the node it was placed on; answered as soon as it is."""
        import ray

        found: str = ray.get_runtime_context().get_node_id()
        return found

    def start(self, make: Callable[[], Worker[Any, Any]]) -> Reply:
        try:
            self._worker = make()
        except UserError as error:
            return Reply(user_error=error)
        except Exception as error:  # noqa: BLE001  # the driver decides what a failed start means
            return Reply(kind=type(error).__name__, message=str(error), details=traceback.format_exc())
        return Reply()

    def run(self, task: Any) -> Reply:
        return attempt(self._worker, task)


@dataclass(slots=True, kw_only=True, eq=False)
class Hired:
    """An actor, and where it is."""

    number: int
    actor: Any
    node: str = ""
    """Empty until it is placed."""


class Places:
    """Hires actors, and knows whether any node could ever take one."""

    def __init__(self, settings: ClusterConfig, needs_gpu: bool):
        import ray

        self._ray, self._settings = ray, settings
        self._gpus = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(needs_gpu)
        self._num_hired, self._staff = 0, list[Hired]()
        self._refused: dict[str, NumericsError] = {}
        self._homeless_since = math.nan

    @property
    def num_wanted(self) -> int:
        """Actors, if there is work for all."""
        return self._settings.workers

    def hire(self) -> Hired:
        """An actor that is placed as soon as a node has room; on none that is refused."""
        host = self._ray.remote(max_restarts=0, max_task_retries=0)(_Host)
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(self._refused))})"} if self._refused else {}
        options = {"num_cpus": self._settings.threads_per_worker, "num_gpus": self._gpus, "label_selector": elsewhere}
        hired = Hired(number=self._num_hired, actor=host.options(**options).remote())
        self._num_hired += 1
        self._staff.append(hired)
        return hired

    def dismiss(self, hired: Hired) -> None:
        """End an actor."""
        self._ray.kill(hired.actor)
        self._staff.remove(hired)

    def close(self) -> None:
        """Dismiss all that are left."""
        for hired in list(self._staff):
            self.dismiss(hired)

    def refuse(self, node: str, error: NumericsError) -> None:
        """Do without a node from now on."""
        self._refused[node] = error

    def settle(self) -> None:
        """There is a worker: the wait for a node is over."""
        self._homeless_since = math.nan

    def await_room(self) -> str:
        """To be asked again and again while no actor is placed; says so once if no node fits, and there is a wait.

        An actor that fits nowhere would wait for ever without an error. While there is a worker, others may.

        Raises:
            ConfigError: if no node fits, and none came before the wait was over.
        """
        if self._fits():
            self.settle()
            return ""
        now, patience, told = time.monotonic(), self._settings.wait_for_resources_seconds, ""
        need = f"{self._settings.threads_per_worker:g} CPUs and {self._gpus:g} GPUs"
        if math.isnan(self._homeless_since):
            self._homeless_since = now
            told = f"a worker needs {need}, and no node has them yet" if patience else ""
        if now - self._homeless_since < patience:
            return told
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
