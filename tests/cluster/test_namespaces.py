"""Two nodes with their own addresses and a cable between them: it is cut while they work, and mended."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_nodes import gated, last_run

from sae_census.config import AnalyzeConfig, ClusterConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census import fill as flow
from sae_census.flows.census.analyze import analyze

pytestmark = pytest.mark.ray
HEAD, OTHER, PORT = "10.213.7.1", "10.213.7.2", 6399
NAMES = [f"census{os.getpid()}{side}" for side in "ab"]
_QUICK = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that is cut off is declared dead after some seconds."""
_UP = "Ray runtime started."


class Wire:
    """Two network namespaces, and the cable between them; the head is in the first."""

    def __init__(self) -> None:
        self._nodes: list[subprocess.Popen[bytes]] = []
        a, b = NAMES
        for name in NAMES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for name, address in ((a, HEAD), (b, OTHER)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        self._folder = Path(tempfile.mkdtemp(prefix="ns", dir="/tmp"))  # paths of sockets must be short
        here = Path(__file__).resolve().parent
        self._environment = os.environ | _QUICK | {"PYTHONPATH": f"{here.parent}:{here}"}

    def run(self, side: int, *command: str) -> subprocess.Popen[bytes]:
        """A process group in one of the namespaces."""
        with (self._folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", NAMES[side], *command],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(self, side: int) -> subprocess.Popen[bytes]:
        """A Ray node of one CPU."""
        if side:
            where = [f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}"]
        else:
            where = ["--head", f"--port={PORT}", f"--node-ip-address={HEAD}", "--include-dashboard=false"]
            where.append(f"--temp-dir={self._folder}")
        fixed = ["--num-cpus=1", f"--object-store-memory={100 << 20}", "--disable-usage-stats", "--block"]
        num_up = self.log().count(_UP)
        node = self.run(side, sys.executable, "-m", "ray.scripts.scripts", "start", *where, *fixed)
        self._nodes.append(node)
        while self.log().count(_UP) == num_up:
            assert node.poll() is None, self.log()
            time.sleep(0.1)
        return node

    def cable(self, state: str) -> None:
        ip("-n", NAMES[1], "link", "set", "cable", state)

    def log(self) -> str:
        path = self._folder / "log.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        for node in self._nodes:
            node.send_signal(signal.SIGTERM)  # it ends what it has started
        for node in self._nodes:
            node.wait(60)
        forget()
        shutil.rmtree(self._folder, ignore_errors=True)


def forget() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    try:
        made = Wire()
    except FileNotFoundError:
        pytest.skip("iproute2 is not installed: no network namespaces")
    except subprocess.CalledProcessError as error:
        forget()
        pytest.skip(f"this machine allows no network namespaces ({error.stderr.strip()}); be root, with CAP_NET_ADMIN")
    try:
        yield made
    finally:
        made.close()


def drive(config: str, gate: str) -> None:
    """What the driver does in its namespace."""
    flow.AnalysisSession = gated(Path(gate))  # type: ignore[misc]
    analyze(AnalyzeConfig.model_validate_json(Path(config).read_text()), print)


def nodes_at_work(root: Path, driver: subprocess.Popen[bytes], wire: Wire, enough: Callable[[set[str]], bool]) -> None:
    """Wait until shards have begun on enough nodes."""
    while True:
        lines = [line for path in root.glob("events/*.jsonl") for line in path.read_text().splitlines()]
        if enough({line.split('"node": "')[1].split('"')[0] for line in lines if '"task_started"' in line}):
            return
        assert driver.poll() is None, wire.log()
        time.sleep(0.05)


@pytest.mark.long
def test_a_node_is_cut_off_comes_back_and_the_catalog_is_that_of_one_process(
    wire: Wire, analyze_config: Callable[..., Any], tmp_path: Path
) -> None:
    whole = analyze(analyze_config(tmp_path / "inline"), lambda line: None).catalog.digest
    root, gate = tmp_path / "nodes", tmp_path / "gate"
    cluster = ClusterConfig(executor="ray", workers=2, threads_per_worker=1, address=f"{HEAD}:{PORT}")
    config = analyze_config(root, cluster=cluster.model_dump())
    (tmp_path / "config.json").write_text(config.model_dump_json())
    wire.start_node(0)
    program = "import sys, test_namespaces; test_namespaces.drive(*sys.argv[1:])"
    other = wire.start_node(1)
    driver = wire.run(0, sys.executable, "-c", program, str(tmp_path / "config.json"), str(gate))
    try:
        seen: set[str] = set()
        nodes_at_work(root, driver, wire, lambda nodes: len(nodes) == 2 and not seen.update(nodes))
        wire.cable("down")
        while not last_run(root).lost:
            assert driver.poll() is None, wire.log()
            time.sleep(0.1)
        wire.cable("up")
        other.wait(60)  # what was declared dead does not come back as the same node
        wire.start_node(1)
        nodes_at_work(root, driver, wire, lambda nodes: bool(nodes - seen))
    finally:
        gate.touch()
        driver.wait(120)
    assert driver.returncode == 0, wire.log()
    run = last_run(root)
    assert (run.state, run.shards_done, run.failures) == ("finished", run.shards_planned, ())
    assert [item.shard_id for item in run.lost if item.shard_id]
    assert Catalog(str(root), "default").digest == whole
