"""Workers die, hang, raise and lie: every task still comes to exactly one outcome, and the bytes stay the same."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_census.config import ClusterConfig
from sae_census.errors import ConfigError, ShardError
from sae_census.flows.census.analyze import analyze
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.census import publish
from sae_census.steps.cluster import connected, run_tasks
from sae_census.steps.cluster.outcomes import Outcome

pytestmark = [
    pytest.mark.ray,
    # Ray's own threads and sockets are collected late, and it warns about its future defaults
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RAY = ClusterConfig(executor="ray", workers=2, threads_per_worker=1)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    with connected(RAY):
        yield


def toy(misbehave: Callable[[int], None]) -> Callable[[], Any]:
    """A maker of workers that square numbers after misbehaving; a closure, so that it travels by value."""

    class Toy:
        def run(self, task: int) -> int:
            misbehave(task)
            return task * task

    return Toy


def by_task(outcomes: Iterator[Outcome[Any, Any]]) -> dict[int, Outcome[Any, Any]]:
    found = list(outcomes)
    assert len({o.task for o in found}) == len(found)
    return {o.task: o for o in found}


@pytest.mark.parametrize("settings", [ClusterConfig(executor="inline"), RAY], ids=["inline", "ray"])
def test_every_task_has_one_outcome_and_a_failure_is_not_retried(settings: ClusterConfig, tmp_path: Path) -> None:
    def misbehave(task: int) -> None:
        if task == 3:
            with (tmp_path / "tries").open("a") as file:
                file.write("x")
            raise ShardError("three is bad")

    found = by_task(run_tasks(toy(misbehave), range(8), settings))
    assert {t: o.result for t, o in found.items()} == {t: None if t == 3 else t * t for t in range(8)}
    assert (found[3].kind, found[3].message, found[3].attempts) == ("ShardError", "three is bad", 1)
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.parametrize("settings", [ClusterConfig(executor="inline"), RAY], ids=["inline", "ray"])
def test_what_the_user_must_mend_ends_the_run(settings: ClusterConfig) -> None:
    def misbehave(task: int) -> None:
        if task == 2:
            raise ConfigError("mend me")

    with pytest.raises(ConfigError, match="mend me"):
        list(run_tasks(toy(misbehave), range(8), settings))


def test_a_worker_that_cannot_start_for_a_users_reason_says_so() -> None:
    def make() -> Any:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        list(run_tasks(make, range(3), RAY))


def test_what_a_library_warns_of_in_the_workers_is_told_once_by_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    def misbehave(task: int) -> None:
        from sae_census.io.loading import library_warnings

        library_warnings.pass_on("rows of a worker are wrong")

    by_task(run_tasks(toy(misbehave), range(4), RAY))
    assert capsys.readouterr().err.count("warning: rows of a worker are wrong\n") == 1


def test_the_probe_is_judged_before_any_other_task_runs(tmp_path: Path) -> None:
    def misbehave(task: int) -> None:
        (tmp_path / str(task)).touch()

    def judge(outcome: Outcome[Any, Any]) -> None:
        assert outcome.result == 100
        raise ConfigError("hopeless")

    with pytest.raises(ConfigError, match="hopeless"):
        list(run_tasks(toy(misbehave), range(4), RAY, probe=10, judge=judge))
    assert [p.name for p in tmp_path.iterdir()] == ["10"]


def test_a_task_that_kills_every_worker_is_given_up_and_the_rest_is_done() -> None:
    def misbehave(task: int) -> None:
        if task == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    events: list[str] = []
    found = by_task(run_tasks(toy(misbehave), range(6), RAY, on_event=lambda kind, facts: events.append(kind)))
    assert {t: o.result for t, o in found.items()} == {t: None if t == 1 else t * t for t in range(6)}
    assert (found[1].kind, found[1].attempts) == ("ActorDiedError", 3)
    assert events.count("worker_lost") == 3


def test_a_task_that_kills_its_worker_once_is_done_by_another(tmp_path: Path) -> None:
    def misbehave(task: int) -> None:
        mark = tmp_path / str(task)
        if not mark.exists():
            mark.touch()
            sys.exit(0) if task % 2 else os.kill(os.getpid(), signal.SIGKILL)

    found = by_task(run_tasks(toy(misbehave), range(3), RAY))
    assert {t: (o.result, o.attempts) for t, o in found.items()} == {t: (t * t, 2) for t in range(3)}


def test_a_hung_task_is_taken_away_after_its_deadline(tmp_path: Path) -> None:
    def misbehave(task: int) -> None:
        mark = tmp_path / str(task)
        if task == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    patient = RAY.model_copy(update={"deadline_seconds": 3.0})
    found = by_task(run_tasks(toy(misbehave), range(4), patient))
    assert {t: (o.result, o.attempts) for t, o in found.items()} == {t: (t * t, 2 if t == 2 else 1) for t in range(4)}


def test_a_worker_that_fits_nowhere_is_refused_instead_of_waited_for() -> None:
    greedy = RAY.model_copy(update={"gpus_per_worker": 1.0})
    with pytest.raises(ConfigError, match=r"needs 1 CPUs and 1 GPUs on one node.*lower cluster.threads_per_worker"):
        list(run_tasks(toy(lambda task: None), range(2), greedy))


@pytest.mark.long
def test_one_and_two_actors_give_the_catalog_of_one_process(analyze_config: Callable[..., Any], tmp_path: Path) -> None:
    digests = {"inline": analyze(analyze_config(tmp_path / "inline")).catalog.digest}
    for workers in (1, 2):
        cluster = {"executor": "ray", "workers": workers, "threads_per_worker": 1}
        digests[f"{workers} actors"] = analyze(analyze_config(tmp_path / str(workers), cluster=cluster)).catalog.digest
    assert len(set(digests.values())) == 1, digests


def test_actors_of_which_some_are_killed_give_the_catalog_of_one_process(
    analyze_config: Callable[..., Any], tmp_path: Path
) -> None:
    whole = analyze(analyze_config(tmp_path / "inline")).catalog.digest
    killed: list[int] = []
    stop = threading.Event()

    def killer() -> None:
        while not stop.is_set() and len(killed) < 2:
            receipts = list((tmp_path / "killed" / "measures").glob("*/receipts/*.json"))
            victims = _actors()
            if len(receipts) > 3 * len(killed) and victims:
                os.kill(victims[0], signal.SIGKILL)
                killed.append(victims[0])
                time.sleep(1)
            time.sleep(0.01)

    thread = threading.Thread(target=killer)
    thread.start()
    cluster = {"executor": "ray", "workers": 2, "threads_per_worker": 1}
    digest = analyze(analyze_config(tmp_path / "killed", cluster=cluster)).catalog.digest
    stop.set()
    thread.join()
    assert killed
    assert digest == whole


def _actors() -> list[int]:
    """Processes of our Ray that host one of our actors."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::_Host.run" in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_a_run_whose_driver_was_killed_goes_on_where_it_stopped(
    analyze_config: Callable[..., Any], tmp_path: Path
) -> None:
    whole = analyze(analyze_config(tmp_path / "whole")).catalog.digest
    config = analyze_config(tmp_path / "cut")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = (
        "import sys; from pathlib import Path; from sae_census.config import AnalyzeConfig; "
        "from sae_census.flows.census.analyze import analyze; "
        "analyze(AnalyzeConfig.model_validate_json(Path(sys.argv[1]).read_text()), print)"
    )
    kills = 0
    for wanted in (1, 4, 9):
        driver = subprocess.Popen([sys.executable, "-c", program, tmp_path / "config.json"], stdout=subprocess.DEVNULL)
        while driver.poll() is None and len(list((tmp_path / "cut").glob("measures/*/receipts/*"))) < wanted:
            time.sleep(0.002)
        driver.kill()
        kills += driver.wait() == -signal.SIGKILL
    assert kills > 0
    assert analyze(config).catalog.digest == whole
    assert len(publish.snapshots(LocalBlobs(tmp_path / "cut"), "default")) == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "on_exit"), reason="the C library has no on_exit")
def test_a_process_that_has_connected_ends_with_its_exit_code_before_anything_can_crash() -> None:
    """With the nap at the very end, threads that Ray leaves behind meet destroyed objects nearly always."""
    program = (
        "import ctypes, sys\n"
        "from sae_census.config import ClusterConfig\n"
        "from sae_census.steps.cluster import connected\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.on_exit(libc.sleep, None)  # is called last, and sleeps as many seconds as the exit code says\n"
        "for _ in range(2):\n"
        "    with connected(ClusterConfig(executor='ray', workers=1, threads_per_worker=1)):\n"
        "        pass\n"
        "sys.exit(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 60
