"""What is deployed can be parsed, says what its platform asks for, and calls jobs and keys that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from sae_census.cli import command
from sae_census.config import AnalyzeConfig, SweepConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
KUBERNETES = "1.33"
# Hydra leaves the handling of its log files to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return found


def analyze_config(overrides: list[str]) -> AnalyzeConfig:
    """What `sae-census analyze` would run."""
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="analyze_defaults", node=AnalyzeConfig().model_dump(mode="json"))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return command.validate(AnalyzeConfig, compose("analyze", overrides))


def pod(spec: dict[str, Any], volumes: set[str]) -> None:
    """A pod as Kubernetes defines it, that mounts volumes that are there and may take as much as it asks for."""
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    assert {volume["name"] for volume in spec["volumes"]} == volumes
    for container in spec["containers"]:
        assert container["image"] == "sae-census"
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", ["cronjob.yaml", "volume.yaml"])
def test_manifests_are_what_kubernetes_defines(name: str) -> None:
    kubernetes_validate.validate(read(name), KUBERNETES, strict=True)


@pytest.mark.parametrize(("where", "key"), [("spec", "scedule"), ("metadata", "nmae")])
def test_a_misspelt_field_of_a_manifest_is_found(where: str, key: str) -> None:
    manifest = read("cronjob.yaml")
    manifest[where][key] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_dockerfile_has_no_complaints() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["rayjob.yaml", "cronjob.yaml", "volume.yaml"])
def test_every_manifest_names_its_kind_and_itself(name: str) -> None:
    manifest = read(name)
    kinds = {"RayJob": "ray.io/v1", "CronJob": "batch/v1", "PersistentVolumeClaim": "v1"}
    assert manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == kinds[manifest["kind"]]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", manifest["metadata"]["name"])


def test_the_rayjob_runs_an_analysis_that_waits_for_its_nodes() -> None:
    spec = read("rayjob.yaml")["spec"]
    known = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
    assert spec.keys() <= known  # of KubeRay's RayJobSpec
    program, job, *overrides = shlex.split(spec["entrypoint"])
    assert (program, job) == ("sae-census", "analyze")
    config = analyze_config(overrides)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == __import__("ray").__version__
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"]
    for part in (cluster["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
        pod(part["template"]["spec"], {"data"})
    (worker,) = group["template"]["spec"]["containers"]
    per_node = int(worker["resources"]["limits"]["cpu"]) // config.cluster.threads_per_worker
    assert per_node >= 1
    assert config.cluster.workers == per_node * group["maxReplicas"]
    assert (config.cluster.executor, config.cluster.address) == ("ray", "auto")
    assert config.cluster.wait_for_resources_seconds > 0
    assert config.store.root.startswith(worker["volumeMounts"][0]["mountPath"])


def test_the_cronjob_sweeps_once_at_a_time() -> None:
    spec = read("cronjob.yaml")["spec"]
    assert len(spec["schedule"].split()) == 5
    assert spec["concurrencyPolicy"] == "Forbid"
    work = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert work["restartPolicy"] == "Never"
    pod(work, {"data"})
    (sweep,) = work["containers"]
    assert sweep["command"] == ["sae-census", "sweep"]
    keys = {argument.partition("=")[0].split(".")[0] for argument in sweep["args"]}
    assert keys <= SweepConfig.model_fields.keys()


def test_the_runtime_env_leaves_data_out_and_takes_all_code() -> None:
    from ray._private.thirdparty.pathspec import PathSpec  # the matcher that Ray itself uses

    env = read("runtime_env.yaml")
    assert env.keys() == {"excludes", "env_vars"}
    out = PathSpec.from_lines("gitwildmatch", env["excludes"])
    for path in ("runs/a.json", ".venv/bin/python", ".git/HEAD", "my/corpus.jsonl", "x.parquet", "a/p.zarr.zip"):
        assert out.match_file(path), path
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = [path for path in tracked if path.startswith(("pipeline/", "conf/"))]
    assert len(needed) > 50
    assert not list(out.match_files(needed))


def instructions(text: str) -> list[tuple[str, str]]:
    """Of a Dockerfile, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line]


def test_the_image_copies_what_setup_needs_and_runs_it_as_a_common_user(tmp_path: Path) -> None:
    steps = instructions((DEPLOY / "Dockerfile").read_text())
    names = [name for name, _ in steps]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "VOLUME", "CMD"}
    user, setup = names.index("USER"), steps.index(("RUN", "scripts/setup cluster"))
    copies = [step.split()[1:] for name, step in steps[:setup] if name == "COPY"]
    assert all(step.split()[0].startswith("--chown=") for name, step in steps if name == "COPY")
    assert user < names.index("COPY") < setup
    copied = {source for *sources, _ in copies for source in sources}
    assert all((ROOT / source).exists() for source in copied)
    wanted = set(re.findall(r"[\w./-]+", re.findall(r"state=\$\(cat ([^|]*)", (ROOT / "scripts/setup").read_text())[0]))
    assert wanted <= copied
    project = (ROOT / "pyproject.toml").read_text()
    assert 'where = ["pipeline"]' in project
    assert {"pipeline", "conf"} <= copied  # the package links to conf/
    assert "\ncluster = [" in project


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("gpus", "workers"), [("", 12), ("4", 12)])
def test_the_slurm_script_starts_ray_on_every_node_and_the_job_on_the_first(
    gpus: str, workers: int, tmp_path: Path
) -> None:
    stub(
        tmp_path / "bin", "scontrol", 'test "$*" = "show hostnames node[07-09]" && printf "node07\\nnode08\\nnode09\\n"'
    )
    stub(tmp_path / "bin", "srun", "printf '%s\\n' \"$@\"")
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[07-09]", "SLURM_JOB_NUM_NODES": "3"}
    slurm |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": str(tmp_path)}
    slurm |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    env = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(DEPLOY / "slurm.sbatch"), "experiment=demo", "store.root=/shared/my runs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    ray, job = words[: words.index("--")], words[words.index("--") + 1 :]
    assert ray[1:3] == [".venv/bin/ray", "symmetric-run"]
    options = dict(zip(ray[3::2], ray[4::2]))
    assert options == {"--address": "node07:24567", "--min-nodes": "3", "--num-cpus": "8", "--num-gpus": gpus or "0"}
    assert job[:2] == [".venv/bin/sae-census", "analyze"]
    config = analyze_config([word.replace("/shared/my runs", "/shared/my\\ runs") for word in job[2:]])
    assert config.cluster.workers == workers
    assert (config.cluster.executor, config.cluster.address) == ("ray", "auto")


def test_ray_knows_the_options_of_the_slurm_script() -> None:
    from ray.scripts import symmetric_run

    text = Path(symmetric_run.__file__).read_text()
    assert "--address" in text
    assert "--min-nodes" in text
