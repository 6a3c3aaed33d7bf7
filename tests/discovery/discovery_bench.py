"""The tiny world that discovery is asked in: a model with its SAEs, with a catalog and without."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, MakeConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sae_census.config import DiscoverRequest, DiscoveryConfig, SaeConfig
from sae_census.findings import Discovery, FoundFeature
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.steps.discovery.discoverer import Discoverer

TEXT = 'river water stone 🙂 café, def return value "list"\nfor index mother Zürich 日本 2024'
SITES = (("blocks.0.hook_resid_post", "early"), ("blocks.1.hook_resid_post", "late"))
CLOSE = 1e-4
GATES = ("standard", "jumprelu", "topk", "gated")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The tiny model with its SAEs, and whatever answers from it."""

    model: Path
    saes: tuple[SaeConfig, ...]
    catalog: Catalog | None = None

    def config(self, **fields: Any) -> DiscoveryConfig:
        return DiscoveryConfig.model_validate(
            {
                "model": {"id": str(self.model), "dtype": "float32", "device": "cpu"},
                "saes": self.saes,
                "catalog": None if self.catalog is None else str(self.catalog.folder.parent),
                "threads": 1,
                "cache_mb": 0,
            }
            | fields
        )

    def open(self, **fields: Any) -> Discoverer:
        return open_discoverer(self.config(**fields))


@pytest.fixture(scope="module")
def bench(model_dir: Path, sae_dirs: dict[str, Path]) -> Bench:
    return Bench(model=model_dir, saes=tuple(SaeConfig(path=str(sae_dirs[name])) for name in ("late", "early")))


@pytest.fixture(scope="module")
def bare(bench: Bench) -> Discoverer:
    return bench.open()


@pytest.fixture(scope="module")
def catalog_bench(bench: Bench, analyze_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """With a catalog that leaves the first token and position 5 out."""
    root = tmp_path_factory.mktemp("background")
    analyze(analyze_config(root, masks={"first_positions": 1, "positions": [5]}))
    return Bench(model=bench.model, saes=bench.saes, catalog=Catalog(root))


@pytest.fixture(scope="module")
def informed(catalog_bench: Bench) -> Discoverer:
    return catalog_bench.open()


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One SAE of 40 features of each gate; `gated` and `topk` on layer 1, the others on layer 0."""
    folder = tmp_path_factory.mktemp("gates")
    found = {}
    for number, gate in enumerate(GATES):
        generator = torch.Generator().manual_seed(number)
        w = torch.randn(WIDTH, 40, generator=generator)
        tensors = {"W_enc": w, "W_dec": w.T.contiguous(), "b_dec": torch.randn(WIDTH, generator=generator)}
        if gate == "gated":
            tensors |= {name: torch.randn(40, generator=generator) for name in ("b_gate", "b_mag", "r_mag")}
        else:
            tensors["b_enc"] = torch.randn(40, generator=generator)
        if gate == "jumprelu":
            tensors["threshold"] = torch.rand(40, generator=generator) * 4
        found[gate] = folder / gate
        found[gate].mkdir()
        save_file(tensors, found[gate] / "sae_weights.safetensors")
        layer = 1 if gate in ("topk", "gated") else 0
        config = {"architecture": gate, "d_in": WIDTH, "d_sae": 40, "dtype": "float32", "k": 5}
        config |= {"apply_b_dec_to_input": True, "metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"}}
        (found[gate] / "cfg.json").write_text(json.dumps(config))
    return found


def ids_of(bench: Bench, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(bench.model)(text)["input_ids"]


def of(feature: FoundFeature) -> tuple[int, str, int]:
    return feature.layer, feature.sae, feature.feature_id


def ask(discoverer: Discoverer, **fields: Any) -> Discovery:
    return discoverer.discover(DiscoverRequest.model_validate(fields))
