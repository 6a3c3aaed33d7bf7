"""What lies where a config names a model, a tokenizer or an SAE may change at any time: who loads it looks again."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from safetensors.torch import load_file, save_file

from sae_census.config import (
    AblateConfig,
    AnalyzeConfig,
    AttributeConfig,
    DiscoveryConfig,
    LogitsConfig,
    SnapshotsConfig,
    TraceConfig,
    VerifyConfig,
)
from sae_census.errors import IdentityError, UserError
from sae_census.flows.catalog.attribute import attribute
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.fill import Filling
from sae_census.flows.census.identity import identify
from sae_census.flows.census.snapshots import build
from sae_census.flows.census.verify import verify
from sae_census.flows.discovery.batch import BatchSettings, BatchWorker
from sae_census.flows.discovery.discover import open_discoverer, plan_of
from sae_census.flows.effects.ablate import ablate
from sae_census.flows.effects.trace import trace
from sae_census.steps.census.logits import LogitSettings, LogitWorker

PARTS = {
    "model": r"^model .* (was changed while this run|is not the one that)",
    "tokenizer": r"^the tokenizer of .* (was changed while this run|is not the one that)",
    "late": r"^SAE blocks\.1\.hook_resid_post/late (was changed while this run|is not the one that)",
}


@dataclass(frozen=True)
class World:
    """Copies of the tiny model and SAEs, and a store with a catalog made from them."""

    folder: Path
    config: AnalyzeConfig

    @contextmanager
    def swapped(self, part: str) -> Iterator[None]:
        """Another file lies where the part was, under the same name."""
        file = (
            self.folder
            / {
                "model": "model/model.safetensors",
                "tokenizer": "model/tokenizer.json",
                "late": "late/sae_weights.safetensors",
            }[part]
        )
        kept = file.read_bytes()
        draft = file.with_suffix(".draft")
        if part == "tokenizer":
            rules = json.loads(kept)
            rules["model"]["merges"] = rules["model"]["merges"][:-9]
            draft.write_text(json.dumps(rules))
        else:
            tensors = load_file(file)
            name = "model.layers.0.mlp.up_proj.weight" if part == "model" else "b_enc"
            save_file(tensors | {name: tensors[name] + 0.25}, draft, metadata={"format": "pt"})
        try:
            draft.replace(file)
            yield
        finally:
            draft.write_bytes(kept)
            draft.replace(file)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, sae_dirs: dict[str, Path], analyze_config: MakeConfig
) -> World:
    folder = tmp_path_factory.mktemp("parts")
    shutil.copytree(model_dir, folder / "model")
    for name, path in sae_dirs.items():
        shutil.copytree(path, folder / name)
    config = analyze_config(
        folder / "runs",
        model={"id": str(folder / "model")},
        saes=[{"path": str(folder / name)} for name in ("late", "early")],
    )
    analyze(config, quiet)
    return World(folder, config)


def quiet(_line: str) -> None:
    pass


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_swapped_after_planning_stops_the_run(part: str, world: World, tmp_path: Path) -> None:
    config = world.config.model_copy(update={"store": world.config.store.model_copy(update={"root": str(tmp_path)})})
    filling = Filling(config, quiet)
    with world.swapped(part), pytest.raises(IdentityError, match=PARTS[part]) as error:
        filling.run()
    assert str(error.value).endswith("let its files be, and run the same command again")
    assert not list(tmp_path.rglob("receipts/*"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_swapped_after_planning_stops_attribution_and_batches_of_prompts(
    part: str, world: World, tmp_path: Path
) -> None:
    config = world.config
    planned = identify(config).provenance
    settings = LogitSettings(model=config.model, saes=config.saes, logits=LogitsConfig(), threads=1, planned=planned)
    asked = DiscoveryConfig(model=config.model, saes=config.saes, threads=1, cache_mb=0)
    batch = BatchSettings(config=asked, planned=plan_of(asked), request={}, prompts="", parts=str(tmp_path))
    LogitWorker(settings)
    BatchWorker(batch)
    with world.swapped(part):
        with pytest.raises(IdentityError, match=PARTS[part]):
            LogitWorker(settings)
        with pytest.raises(IdentityError, match=PARTS[part]):
            BatchWorker(batch)


def test_the_digests_of_an_answer_are_those_of_what_was_loaded(world: World) -> None:
    asked = DiscoveryConfig(model=world.config.model, saes=world.config.saes, threads=1, cache_mb=0)
    with world.swapped("model"):
        later = plan_of(asked)
        loaded = open_discoverer(asked)
    assert loaded._loaded.model_digest == later.model != plan_of(asked).model


@pytest.mark.parametrize("part", PARTS)
def test_whoever_goes_on_from_a_catalog_refuses_another_part_than_it_was_made_with(part: str, world: World) -> None:
    base: dict[str, Any] = {"store": world.config.store.model_dump(), "catalog": {"name": "default"}}
    base["cluster"] = {"threads_per_worker": 1}
    device = {"dtype": "float32", "device": "cpu"}
    with world.swapped(part):
        for run in (
            lambda: trace(TraceConfig(**base, device="cpu", sae="late"), quiet),
            lambda: ablate(AblateConfig(**base, sae="late"), quiet),
        ):
            with pytest.raises(IdentityError, match=PARTS[part]) as error:
                run()
            assert "that catalog 'default' was made with" in str(error.value)
        with pytest.raises(IdentityError, match=PARTS[part]):
            attribute(AttributeConfig(**base, model=device, logits={"top_k": 2}), quiet)


def test_a_snapshot_is_not_built_with_the_texts_of_another_tokenizer(world: World) -> None:
    asked = {"store": world.config.store.model_dump(), "action": "build", "catalog": {"name": "default"}}
    config = SnapshotsConfig(**asked, into="other", cluster={"threads_per_worker": 1})
    with world.swapped("tokenizer"), pytest.raises(UserError, match=PARTS["tokenizer"]):
        build(config, quiet)
    assert build(config, quiet)[1]


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_recomputing_says_that_the_parts_are_others_and_does_not_blame_the_shards(part: str, world: World) -> None:
    config = VerifyConfig(store=world.config.store, recompute=1)
    assert verify(config).wrong == ()
    with world.swapped(part):
        wrong = verify(config).wrong
    assert len(wrong) == 2
    assert all("cannot be recomputed here" in line and "is not the one that measure" in line for line in wrong)
