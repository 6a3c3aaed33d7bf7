"""Nodes of several kinds: each class of workers finds its own, other bits are declared, and nodes that leave rest."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from test_nodes import add, my_node, toy, wait_for

from sae_census.cli import verify as verify_job
from sae_census.cli.plan import describe
from sae_census.config import ClusterConfig, VerifyConfig, WorkerClass
from sae_census.errors import ConfigError, IdentityError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.plan import make_plan
from sae_census.flows.census.verify import verify
from sae_census.steps.census.session import AnalysisSession
from sae_census.steps.cluster import places, run_tasks

pytestmark = [
    pytest.mark.ray,
    # Ray's own threads and sockets are collected late, and it warns about its future defaults
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
BIG, SMALL, WIDE = {"resources": {"big": 1}}, {"labels": {"kind": "small"}}, {"memory_gib": 4}


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, Any]]:
    """A head without CPUs, and nodes of three kinds: a custom resource, a label, more memory."""
    environment = pytest.MonkeyPatch()
    here = Path(__file__).resolve().parent
    environment.setenv("PYTHONPATH", f"{here.parent}:{here}")
    made = Cluster()
    made.add_node(num_cpus=0, include_dashboard=False, object_store_memory=100 << 20, memory=1 << 30)
    yield {
        "cluster": made,
        "big": add(made, memory=1 << 30, resources={"big": 1}).node_id,
        "small": add(made, memory=1 << 30, labels={"kind": "small"}).node_id,
        "wide": add(made, memory=8 << 30).node_id,
    }
    made.shutdown()
    environment.undo()


def settings(nodes: dict[str, Any], *classes: dict[str, Any], **more: Any) -> ClusterConfig:
    kinds = tuple(WorkerClass(**kind) for kind in classes)
    return ClusterConfig(executor="ray", threads_per_worker=1, address=nodes["cluster"].address, classes=kinds, **more)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": [{}], "workers": 2}, "leave out workers"),
        ({"classes": [{}], "gpus_per_worker": 0.0}, "leave out workers"),
        ({"classes": [{"resources": {"GPU": 1}}]}, "resources names GPU, which Ray counts itself"),
        ({"classes": [{"labels": {"kind": "!in(a,b)"}}]}, "should match pattern"),
        ({"classes": [{"threads_per_worker": 4}]}, "all classes compute with cluster.threads_per_worker threads"),
    ],
)
def test_classes_that_contradict_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClusterConfig(**given)


def test_without_classes_the_plain_keys_are_one() -> None:
    plain = ClusterConfig(workers=3, gpus_per_worker=0.5)
    assert plain.worker_classes == (WorkerClass(workers=3, gpus_per_worker=0.5),)
    assert ClusterConfig(classes=[{"workers": 2}, {}]).num_workers == 3


def test_the_plan_names_the_classes(analyze_config: Callable[..., Any], tmp_path: Path) -> None:
    classes = [{"workers": 2, "gpus_per_worker": 1, "memory_gib": 16}, SMALL | {"gpus_per_worker": 0}]
    config = analyze_config(tmp_path, cluster={"classes": classes})
    lines = describe(make_plan(config), config.cluster).splitlines()
    assert [line for line in lines if line.startswith("workers")] == [
        "workers   2 x 1 CPUs and 1 GPUs and 16 GiB",
        "workers   1 x 1 CPUs and 0 GPUs and label kind=small",
    ]


def test_each_class_works_on_the_nodes_of_its_kind(nodes: dict[str, Any], tmp_path: Path) -> None:
    started = {}

    def hear(kind: str, facts: dict[str, Any]) -> None:
        if kind == "worker_started":
            started[facts["worker"]] = facts["node"]

    def together(task: int) -> None:
        (tmp_path / my_node()).touch()
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.02)

    found = run_tasks(toy(together), range(6), settings(nodes, BIG, SMALL, WIDE), on_event=hear)
    assert {o.task: o.result for o in found} == {task: task * task for task in range(6)}
    assert started == {0: nodes["big"], 1: nodes["small"], 2: nodes["wide"]}


def test_a_class_that_no_node_fits_holds_up_nobody_and_alone_it_is_refused(nodes: dict[str, Any]) -> None:
    absent = {"resources": {"absent": 2}, "labels": {"kind": "small"}}
    found = run_tasks(toy(lambda task: None), range(3), settings(nodes, absent, SMALL))
    assert {o.task: o.result for o in found} == {0: 0, 1: 1, 2: 4}
    with pytest.raises(ConfigError, match="needs 1 CPUs and 0 GPUs and 2 absent and label kind=small on one node"):
        list(run_tasks(toy(lambda task: None), range(3), settings(nodes, absent)))


def test_a_mixed_measure_says_so_everywhere_and_is_never_a_strict_one(
    nodes: dict[str, Any],
    analyze_config: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sae_census.flows.census.fill.AnalysisSession", another_machine_on(nodes["big"], tmp_path))
    cluster = settings(nodes, BIG, SMALL, mixed_numerics=True).model_dump()
    mixed = analyze(analyze_config(tmp_path / "store", cluster=cluster), lambda line: None).catalog
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("measures/*/receipts/*.json")]
    ran = [receipt["ran"]["numerics"]["device_class"] for receipt in receipts]
    assert mixed.measure.numerics == "mixed"
    assert sorted(each["device_class"] for each in mixed.manifest.numerics["mixed"]) == sorted(set(ran))
    assert set(ran) > {"another"}

    others = ran.count("another")
    asked = VerifyConfig(store={"root": str(tmp_path / "store")}, recompute=1000)
    verdict = verify(asked)
    assert verdict.wrong == ()
    assert verdict.num_recomputed == len(ran) - others
    assert len(verdict.mixed) == 2  # a measure for each SAE
    for sentence in verdict.mixed:
        assert f"is mixed: {others // 2} of its {len(ran) // 2} shards come from machines that compute" in sentence
    assert verify_job.job(asked) == 0
    assert verdict.mixed[0] in capsys.readouterr().out

    monkeypatch.undo()
    with pytest.raises(IdentityError, match=r"measure\.numerics"):
        analyze(analyze_config(tmp_path / "store"), lambda line: None)
    strict = analyze(analyze_config(tmp_path / "strict"), lambda line: None).catalog
    assert not {*strict.manifest.measures.values()} & {*mixed.manifest.measures.values()}
    assert strict.manifest.files == mixed.manifest.files  # the other machine only says that it is another


def another_machine_on(node: str, folder: Path) -> type[AnalysisSession]:
    """A session that describes its machine otherwise on one node, and waits until both have begun."""

    class Session(AnalysisSession):
        def __init__(self, *args: Any):
            from sae_census.io.model import device

            true = device.configure
            if my_node() == node:
                device.configure = lambda *given: true(*given) | {"device_class": "another"}
            super().__init__(*args)

        def run(self, task: Any) -> Any:
            (folder / f"mark-{my_node()}").touch()
            while len(list(folder.glob("mark-*"))) < 2:
                time.sleep(0.02)
            return super().run(task)

    return Session


def test_a_mixed_measure_needs_a_dtype(analyze_config: Callable[..., Any], tmp_path: Path) -> None:
    config = analyze_config(tmp_path, cluster={"mixed_numerics": True}, model={"dtype": "auto"})
    with pytest.raises(ConfigError, match=r"choose one, as model\.dtype=float32"):
        analyze(config)


def test_a_node_that_is_about_to_leave_gets_no_more_tasks(
    nodes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_DRAINING_SECONDS", 0.0)
    leaver, gate, left = nodes["small"], tmp_path / "gate", tmp_path / "left"
    told: list[tuple[str, str]] = []

    def hear(kind: str, facts: dict[str, Any]) -> None:
        told.append((kind, facts.get("node", "")))
        if {node for kind, node in told if kind == "task_started"} >= {leaver, nodes["big"]} and not gate.exists():
            client = ray._raylet.GcsClient(address=nodes["cluster"].address)
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            assert client.drain_node(leaver, reason, "spot", int(time.time() * 1000) + 600_000)[0]
            gate.touch()
        if kind == "worker_left":
            left.touch()
        if kind == "worker_lost" and facts["attempts"]:
            raise AssertionError(facts)

    found = run_tasks(
        toy(lambda task: wait_for(gate if task < 2 else left)),
        range(8),
        settings(nodes, BIG, SMALL, deadline_seconds=60.0),
        on_event=hear,
        describe=lambda task: {"shard_id": str(task)},
    )
    assert {o.task: (o.result, o.attempts) for o in found} == {task: (task * task, 1) for task in range(8)}
    assert told.count(("task_started", leaver)) == 1
    assert told.count(("worker_left", leaver)) == 1
    assert told.count(("task_started", nodes["big"])) == 7
