"""Several nodes: a run spreads over them, outlives those that go, uses those that come, and gives the same bytes."""

import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from sae_census.config import ClusterConfig
from sae_census.errors import ConfigError, NumericsError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.status import RunStatus, runs
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census.session import AnalysisSession
from sae_census.steps.cluster import connected, run_tasks
from sae_census.steps.store import progress

pytestmark = [
    pytest.mark.ray,
    # Ray's own threads and sockets are collected late, and it warns about its future defaults
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CLIENT_PORT = 20391


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and three nodes of one CPU; what comes through the client finds this code by its path."""
    environment = pytest.MonkeyPatch()
    here = Path(__file__).resolve().parent
    environment.setenv("PYTHONPATH", f"{here.parent}:{here}")
    made = Cluster()
    made.add_node(
        num_cpus=0,
        ray_client_server_port=CLIENT_PORT,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _system_config={
            "metrics_report_interval_ms": 500,
            "health_check_initial_delay_ms": 0,  # a node that is gone is missed after two seconds instead of many
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 4,
        },
    )
    for _ in range(3):
        add(made)
    yield made
    made.shutdown()
    environment.undo()


def add(cluster: Cluster, num_cpus: int = 1, **more: Any) -> Any:
    return cluster.add_node(num_cpus=num_cpus, object_store_memory=100 << 20, **more)


def settings(cluster: Cluster, **more: Any) -> ClusterConfig:
    return ClusterConfig(executor="ray", workers=3, threads_per_worker=1, address=cluster.address, **more)


def toy(misbehave: Callable[[int], None], start: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """A maker of workers that square numbers after misbehaving; a closure, so that it travels by value."""

    class Toy:
        def __init__(self) -> None:
            start()

        def run(self, task: int) -> int:
            misbehave(task)
            return task * task

    return Toy


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def my_node() -> str:
    found: str = ray.get_runtime_context().get_node_id()
    return found


@pytest.mark.parametrize("address", ["", "somewhere", "http://head:80", "ray://head", "head:port", "a b:1"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ValidationError):
        ClusterConfig(address=address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "no-such-host.invalid:6379"])
def test_an_address_where_nobody_answers_is_said_in_a_sentence_at_once(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(run_tasks(toy(lambda task: None), range(2), ClusterConfig(executor="ray", address=address)))
    assert str(caught.value).startswith(f"cluster.address {address}: no Ray cluster answers there (")
    assert str(caught.value).endswith("; start one or use local")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["host:port", "auto"])
def test_every_form_of_address_reaches_the_cluster(form: str, cluster: Cluster, monkeypatch: Any) -> None:
    if form == "auto":
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # what `auto` looks at first
    address = {"host:port": cluster.address, "auto": "auto"}[form]
    asked = settings(cluster).model_copy(update={"address": address, "workers": 1})
    found = run_tasks(toy(lambda task: None), range(4), asked)
    assert {o.task: o.result for o in found} == {task: task * task for task in range(4)}


CLIENT = """
import sys
from sae_census.config import ClusterConfig
from sae_census.steps.cluster import run_tasks
from test_nodes import toy
settings = ClusterConfig(executor="ray", workers=1, threads_per_worker=1, address=sys.argv[1])
print(sorted(outcome.result for outcome in run_tasks(toy(lambda task: None), range(4), settings)))
"""


def test_the_cluster_is_reached_from_outside_through_its_client_server(cluster: Cluster) -> None:
    command = [sys.executable, "-c", CLIENT, f"ray://127.0.0.1:{CLIENT_PORT}"]
    for _ in range(3):  # Ray's client server sometimes fails to start its child on a busy machine
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 or "its client server could not open a session" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[0, 1, 4, 9]\n"


def test_a_run_outlives_a_node_uses_one_that_joins_and_gives_the_catalog_of_one_process(
    cluster: Cluster, analyze_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(analyze_config(tmp_path / "inline"), lambda line: None).catalog.digest
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr("sae_census.flows.census.fill.AnalysisSession", gated(tmp_path / "gate"))
    root = tmp_path / "nodes"
    config = analyze_config(root, cluster=settings(cluster).model_dump() | {"workers": 4})  # one waits for a node
    with connected(config.cluster), ThreadPoolExecutor(1) as pool:  # nodes can be added in the main thread only
        future = pool.submit(analyze, config, lambda line: None)
        try:
            first = nodes_at_work(root, future, lambda nodes: len(nodes) == 3)
            gone = next(node for node in cluster.worker_nodes if node.node_id in first)
            cluster.remove_node(gone, allow_graceful=False)
            joined = add(cluster)
            nodes_at_work(root, future, lambda nodes: joined.node_id in nodes)
        finally:
            (tmp_path / "gate").touch()
        done = future.result()
    assert done.catalog.digest == whole
    run = last_run(root)
    assert (run.state, run.shards_done, run.failures) == ("finished", run.shards_planned, ())
    lost = [item.shard_id for item in run.lost if item.shard_id]
    assert lost
    events = [line for path in root.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    again = [line for line in events if '"task_started"' in line and lost[0] in line]
    assert len(again) == 2
    assert gone.node_id in again[0]
    assert gone.node_id not in again[1]
    assert any('"shard_done"' in line for line in events)


@pytest.mark.long
def test_a_run_that_began_on_two_nodes_ends_on_the_one_that_is_left(
    cluster: Cluster, analyze_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = analyze(analyze_config(tmp_path / "inline"), lambda line: None).catalog.digest
    monkeypatch.setattr("sae_census.flows.census.fill.AnalysisSession", gated(tmp_path / "gate"))
    gone, left = (add(cluster, resources={"pair": 1}) for _ in range(2))
    root = tmp_path / "pair"
    on_the_pair = {"executor": "ray", "threads_per_worker": 1, "address": cluster.address}
    on_the_pair["classes"] = [{"workers": 2, "resources": {"pair": 1}}]
    config = analyze_config(root, cluster=on_the_pair)
    with connected(config.cluster), ThreadPoolExecutor(1) as pool:
        future = pool.submit(analyze, config, lambda line: None)
        try:
            assert nodes_at_work(root, future, lambda nodes: len(nodes) == 2) == {gone.node_id, left.node_id}
            cluster.remove_node(gone, allow_graceful=False)
        finally:
            (tmp_path / "gate").touch()
        done = future.result()
    cluster.remove_node(left)
    assert done.catalog.digest == whole
    events = [line for path in root.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    lost = next(i for i, line in enumerate(events) if '"worker_lost"' in line and gone.node_id in line)
    after = [line for line in events[lost:] if '"task_started"' in line]
    assert after
    assert all(left.node_id in line for line in after)
    assert last_run(root).failures == ()


def gated(gate: Path) -> type[AnalysisSession]:
    """A session whose shards wait for a file; local, so that it travels by value."""

    class Gated(AnalysisSession):
        def run(self, task: Any) -> Any:
            while not gate.exists():
                time.sleep(0.05)
            return super().run(task)

    return Gated


def nodes_at_work(root: Path, run: Future[Any], enough: Callable[[set[str]], bool]) -> set[str]:
    """Nodes on which a shard of the run has begun, as soon as they are enough."""
    while not run.done():
        lines = [line for path in root.glob("events/*.jsonl") for line in path.read_text().splitlines()]
        nodes = {line.split('"node": "')[1].split('"')[0] for line in lines if '"task_started"' in line}
        if enough(nodes):
            return nodes
        time.sleep(0.05)
    raise AssertionError(run.result())


def last_run(root: Path) -> RunStatus:
    return next(runs(LocalBlobs(root)))


def test_a_node_that_computes_other_bits_is_refused_and_the_others_go_on(cluster: Cluster, tmp_path: Path) -> None:
    with connected(settings(cluster)):
        bad = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    told, mark = [], tmp_path / "refused"

    def start() -> None:
        if my_node() == bad:
            raise NumericsError("this worker computes otherwise")

    def hear(kind: str, facts: dict[str, Any]) -> None:
        if kind == "worker_refused":
            told.append((facts["node"], facts["message"]))
            mark.touch()

    found = run_tasks(toy(lambda task: wait_for(mark), start), range(6), settings(cluster), on_event=hear)
    assert {o.task: o.result for o in found} == {task: task * task for task in range(6)}
    assert told == [(bad, "this worker computes otherwise")]

    def never() -> None:
        raise NumericsError("nobody fits")

    with pytest.raises(NumericsError, match="nobody fits"):
        list(run_tasks(toy(lambda task: None, never), range(2), settings(cluster)))


def test_a_node_that_was_preempted_costs_its_task_no_attempt(cluster: Cluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    once = settings(cluster, max_attempts=1)
    where: dict[str, str] = {}

    def hear(kind: str, facts: dict[str, Any]) -> None:
        if kind == "task_started" and not where:
            where["node"] = facts["node"]
            threading.Thread(target=preempt, args=(facts["node"],), daemon=True).start()
        if kind == "worker_lost":
            where["lost"] = facts["kind"]
            gate.touch()

    def preempt(node_id: str) -> None:
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = ray._raylet.GcsClient(address=cluster.address)
        accepted, why = client.drain_node(node_id, reason, "spot", int(time.time() * 1000) + 1000)
        assert accepted, why
        cluster.remove_node(next(n for n in cluster.worker_nodes if n.node_id == node_id), allow_graceful=False)

    found = list(
        run_tasks(
            toy(lambda task: wait_for(gate)),
            range(2),
            once.model_copy(update={"workers": 1}),
            on_event=hear,
            describe=lambda task: {"shard_id": str(task)},
        )
    )
    assert where["lost"] == "ActorDiedError"
    assert {o.task: (o.result, o.attempts) for o in found} == {0: (0, 1), 1: (1, 1)}


def test_a_worker_waits_for_a_node_that_is_still_to_come_if_told_to(cluster: Cluster) -> None:
    told, heard = threading.Event(), []

    def hear(kind: str, facts: dict[str, Any]) -> None:
        if kind == "waiting":
            heard.append(facts["message"])
            told.set()

    wide = settings(cluster).model_copy(update={"threads_per_worker": 2, "workers": 2})
    with pytest.raises(ConfigError, match=r"set cluster.wait_for_resources_seconds if nodes are still to come"):
        list(run_tasks(toy(lambda task: None), range(2), wide))
    patient = wide.model_copy(update={"wait_for_resources_seconds": 120.0})
    with connected(patient), ThreadPoolExecutor(1) as pool:  # nodes can be added in the main thread only
        found = pool.submit(lambda: list(run_tasks(toy(lambda task: None), range(4), patient, on_event=hear)))
        assert told.wait(60)
        add(cluster, 2)
        assert {o.task: o.result for o in found.result()} == {task: task * task for task in range(4)}
    assert heard == ["a worker needs 2 CPUs and 0 GPUs, and no node has them yet"]


METERED = """
import sys
from sae_census.config import ClusterConfig
from sae_census.steps.cluster import run_tasks
from test_nodes import fail_at_three, toy
settings = ClusterConfig(executor="ray", workers=2, threads_per_worker=1, address=sys.argv[1])
list(run_tasks(toy(fail_at_three), range(5), settings, describe=lambda task: {"tokens": 10}, stage="toy"))
"""


def fail_at_three(task: int) -> None:
    if task == 3:
        raise ValueError("three")


def test_rays_metrics_count_tasks_and_tokens(cluster: Cluster) -> None:
    # Of a process that connects again and again, Ray passes on the metrics of the first time only.
    subprocess.run([sys.executable, "-c", METERED, cluster.address], check=True)
    with connected(settings(cluster)):
        head = next(node for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    address = f"http://{head['NodeManagerAddress']}:{head['MetricsExportPort']}/metrics"
    wanted = {
        'ray_census_tokens_total{stage="toy"} 40.0',
        'ray_census_tasks_ended_total{stage="toy",state="done"} 4.0',
        'ray_census_tasks_ended_total{stage="toy",state="failed"} 1.0',
    }
    until = time.monotonic() + 60  # what is left is handed over when the driver leaves
    while not wanted <= (lines := metrics(address)):
        assert time.monotonic() < until, wanted - lines
        time.sleep(0.3)


def metrics(address: str) -> set[str]:
    """Our lines, without the tags that Ray adds."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_census")]
    found = set()
    for line in lines:
        name, rest = line.split("{", 1)
        tags, value = rest.rsplit("} ", 1)
        kept = ",".join(sorted(tag for tag in tags.split(",") if tag.split("=")[0] in ("stage", "state")))
        found.add(f"{name}{{{kept}}} {value}")
    return found
