"""What is installed from a wheel is whole and stands alone, whatever modules lie in the folder where a user works."""

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae_census.cli import JOBS

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {"sae_census", "sae_discover", "sae_census-0.1.0.dist-info"}
pytestmark = pytest.mark.ray


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {path for path in listed.split("\0") if path and (ROOT / path).exists()}


def build(kind: str, source: Path, out: Path) -> Path:
    """A wheel or sdist of a source tree, made by the installed setuptools and nothing from outside."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist of a clean copy of the tracked files: a stale `build/` would ship deleted modules."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path, follow_symlinks=False)
    return {kind: build(kind, source, out) for kind in ("sdist", "wheel")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An environment that holds the wheel, and the folder where its user works."""

    bin: Path
    site_packages: Path
    work: Path

    def run(self, *command: str, **environment: str) -> str:
        """What a command prints, started in the user's folder, whose modules come first on the path."""
        inherited: Mapping[str, str] = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.work,
            env={**inherited, "PYTHONPATH": str(self.work), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel beside our dependencies but not beside our sources, and a folder of modules that must not be met."""
    home, work = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("work")
    venv.create(home, symlinks=True)
    binaries = home / "bin"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", binaries / "python"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", built["wheel"]], check=True)
    (site_packages,) = (home / "lib").glob("*/site-packages")
    # a plain line: of our own site-packages the .pth files, which lead to the sources, are not followed
    (site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    for module in ("jobs/__init__.py", "conf/__init__.py", "pipeline.py"):
        (work / module).parent.mkdir(exist_ok=True)
        (work / module).write_text(f'raise RuntimeError("{module} of the user was imported")\n')
    (work / "conf/analyze.yaml").write_text("model: {id: nowhere}\n")
    return Installed(bin=binaries, site_packages=site_packages, work=work)


def test_the_wheel_holds_the_two_packages_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == TOP_LEVEL


def test_every_tracked_file_of_the_packages_is_in_the_wheel_and_nothing_else(built: dict[str, Path]) -> None:
    paths = tracked() - {"pipeline/sae_census/conf"}  # a link: its files are tracked where it leads
    expected = {path.removeprefix("pipeline/") for path in paths if path.startswith("pipeline/")}
    expected |= {f"sae_census/{path}" for path in paths if path.startswith("conf/")}
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert wheel.read("sae_census/conf/analyze.yaml") == (ROOT / "conf/analyze.yaml").read_bytes()
    assert names == expected
    for kind in ("conf/analyze.yaml", "conf/experiment/demo.yaml", "io/templates/", "embedded/saes/", "py.typed"):
        assert any(name.startswith(f"sae_census/{kind}") for name in names), kind


def test_a_wheel_made_from_the_sdist_holds_the_same_files(built: dict[str, Path], tmp_path: Path) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    with zipfile.ZipFile(built["wheel"]) as first, zipfile.ZipFile(build("wheel", source, tmp_path)) as second:
        contents = [{n: z.read(n) for n in z.namelist() if ".dist-info/" not in n} for z in (first, second)]
    assert contents[0] == contents[1]


def test_the_modules_of_the_user_would_be_met_first(installed: Installed) -> None:
    names = "'jobs', 'conf', 'pipeline'"
    code = f"import importlib.util as u; print(*(u.find_spec(n).origin for n in ({names})))"
    assert all(origin.startswith(str(installed.work)) for origin in installed.run("python", "-c", code).split())


def test_the_jobs_are_listed_and_a_job_says_its_keys(installed: Installed) -> None:
    listed = installed.run("sae-census", "--help")
    assert all(f"  {job} " in listed for job in JOBS)
    help_text = installed.run("sae-census", "analyze", "--help")
    assert "experiment: demo" in help_text
    assert "\ncorpus:\n" in help_text


WHERE = """
from sae_census.config import ClusterConfig
from sae_census.steps.cluster import run_tasks

class Teller:
    def run(self, task):
        import sae_census
        return sae_census.__file__

if __name__ == "__main__":
    settings = ClusterConfig(executor="ray", workers=1, threads_per_worker=1)
    print(*(outcome.result for outcome in run_tasks(Teller, [0], settings)))
"""


def test_a_job_runs_with_a_ray_worker_and_both_run_the_code_of_the_wheel(
    installed: Installed, model_dir: Path, sae_dirs: dict[str, Path], corpus_dir: Path
) -> None:
    home = str(installed.site_packages / "sae_census")
    here = installed.run("python", "-c", "import sae_census; print(sae_census.__file__)")
    assert here.startswith(home)
    (installed.work / "where.py").write_text(WHERE)
    assert installed.run("python", "where.py").startswith(home)
    chosen = [
        f"model.id={model_dir}",
        f"saes=[{{path: {sae_dirs['late']}}}]",
        f"corpus.source={corpus_dir / 'prose.jsonl'}",
        "corpus.context_length=16",
        "corpus.shard_tokens=160",
        "cluster.executor=ray",
        "cluster.workers=1",
        "cluster.threads_per_worker=1",
        "preflight=off",
        "store.root=runs",
    ]
    assert "sources   1, of which 0 are prepared" in installed.run("sae-census", "plan", *chosen)
    assert not (installed.work / "runs").exists()
    installed.run("sae-census", "analyze", *chosen)
    code = "from sae_census import Catalog; print(Catalog('runs').saes, Catalog('runs').features.num_rows)"
    assert installed.run("python", "-c", code) == "['blocks.1.hook_resid_post/late'] 96\n"


def test_discovery_runs(installed: Installed, model_dir: Path, sae_dirs: dict[str, Path]) -> None:
    chosen = ["--model", str(model_dir), "--sae", str(sae_dirs["late"]), "--prompt", "river water stone bridge"]
    installed.run("sae-discover", *chosen, "--device", "cpu", "--gen_tokens", "4", "--out", "answer.json")
    answer = json.loads((installed.work / "answer.json").read_text())
    assert {feature["sae"] for feature in answer["features"]} == {"late"}
