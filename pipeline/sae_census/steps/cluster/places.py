"""Where actors may be: what each class takes of a node, which nodes are refused or leave, and whether any fits."""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sae_census.config import ClusterConfig, WorkerClass
from sae_census.errors import ConfigError, NumericsError, UserError
from sae_census.io.loading import library_warnings
from sae_census.steps.cluster.outcomes import Reply, Worker, attempt

_DRAINING_SECONDS = 1.0


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
        return Reply(warnings=tuple(library_warnings.passed_on()))

    def run(self, task: Any) -> Reply:
        return replace(attempt(self._worker, task), warnings=tuple(library_warnings.passed_on()))


@dataclass(slots=True, kw_only=True, eq=False)
class PlacedActor:
    """An actor, and where it is."""

    number: int
    kind: int
    """Its class, by its place in the settings."""
    handle: Any
    node: str = ""
    """Empty until it is placed."""


class Places:
    """Starts actors, and knows whether any node could ever take one."""

    def __init__(self, settings: ClusterConfig, needs_gpu: bool):
        import ray

        self._ray, self._settings = ray, settings
        self._kinds = [
            kind if kind.gpus_per_worker is not None else kind.model_copy(update={"gpus_per_worker": float(needs_gpu)})
            for kind in settings.worker_classes
        ]
        self._num_started, self._actors = 0, list[PlacedActor]()
        self._refused: dict[str, NumericsError] = {}
        self._unplaceable_since = math.nan
        self._draining, self._draining_at = set[str](), -math.inf

    def grow(self, num_tasks: int | None) -> list[PlacedActor]:
        """Start what is missing: of every class its number, but no more than there are tasks; if None, one."""
        found = []
        for index, kind in enumerate(self._kinds):
            alive = sum(actor.kind == index for actor in self._actors)
            wanted = 1 if num_tasks is None else min(kind.workers, num_tasks or 1)
            found += [self._start(index) for _ in range(wanted - alive)]
        return found

    def _start(self, index: int) -> PlacedActor:
        """An actor that is placed as soon as a node has room; on none that is refused."""
        kind = self._kinds[index]
        host = self._ray.remote(max_restarts=0, max_task_retries=0)(_Host)
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(self._refused))})"} if self._refused else {}
        handle = host.options(
            num_cpus=self._settings.threads_per_worker,
            num_gpus=kind.gpus_per_worker,
            memory=_bytes(kind),
            resources=kind.resources,
            label_selector={**kind.labels, **elsewhere},
        ).remote()
        actor = PlacedActor(number=self._num_started, kind=index, handle=handle)
        self._num_started += 1
        self._actors.append(actor)
        return actor

    def stop(self, actor: PlacedActor) -> None:
        """End an actor."""
        self._ray.kill(actor.handle)
        self._actors.remove(actor)

    def close(self) -> None:
        """Stop all that are left."""
        for actor in list(self._actors):
            self.stop(actor)

    def refuse(self, node: str, error: NumericsError) -> None:
        """Do without a node from now on."""
        self._refused[node] = error

    @property
    def num_placed(self) -> int:
        """Actors that are on a node."""
        return sum(bool(actor.node) for actor in self._actors)

    def leaving(self) -> list[PlacedActor]:
        """Actors on nodes that are about to be taken back; none if there are no others to do the work."""
        draining = self._draining_nodes()
        going = [actor for actor in self._actors if actor.node in draining]
        return going if len(going) < self.num_placed else []

    def _draining_nodes(self) -> set[str]:
        """Ray has no public word for it; from outside a cluster there is none at all. It takes a millisecond."""
        now = time.monotonic()
        read = getattr(self._ray._private.state.state, "get_draining_nodes", None)
        if read and now - self._draining_at > _DRAINING_SECONDS and not self._ray.util.client.ray.is_connected():
            self._draining, self._draining_at = set(read()), now
        return self._draining

    def await_room(self) -> str:
        """To be asked again and again; says so once if there is neither an actor on a node nor a node that fits.

        An actor that fits nowhere would wait for ever without an error. While another is placed, it may.

        Raises:
            ConfigError: if no node fits, and none came before the wait was over.
        """
        if self.num_placed or self._fits():
            self._unplaceable_since = math.nan
            return ""
        now, patience, told = time.monotonic(), self._settings.wait_for_resources_seconds, ""
        threads = self._settings.threads_per_worker
        need = " or ".join(dict.fromkeys(kind.needs(threads) for kind in self._kinds))
        if math.isnan(self._unplaceable_since):
            self._unplaceable_since = now
            told = f"a worker needs {need}, and no node has them yet" if patience else ""
        if now - self._unplaceable_since < patience:
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
        away = self._refused.keys() | self._draining_nodes()
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in away]
        return any(self._fits_on(kind, node) for kind in self._kinds for node in nodes)

    def _fits_on(self, kind: WorkerClass, node: dict[str, Any]) -> bool:
        need: dict[str, float | None] = {"CPU": self._settings.threads_per_worker, "GPU": kind.gpus_per_worker}
        need |= {"memory": _bytes(kind), **kind.resources}
        return kind.labels.items() <= node["Labels"].items() and all(
            node["Resources"].get(name, 0) >= (amount or 0) for name, amount in need.items()
        )


def _bytes(kind: WorkerClass) -> int | None:
    return int(kind.memory_gib * (1 << 30)) if kind.memory_gib else None
