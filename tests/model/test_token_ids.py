"""A token id beyond the embedding is one line that names the token and both sizes, at every door."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_census import encode_prompts, load_sae, trace_feature
from sae_census.config import AnalyzeConfig, DiscoverRequest, DiscoveryConfig, SteerConfig
from sae_census.errors import ConfigError, RequestError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.flows.effects.steer import steer
from sae_census.io.model.language_model import LanguageModel
from sae_census.records import Receipt

ROWS = 300
NEW = "<|new|>"
LINE = rf"token {ROWS} \('<\|new\|>'\) is beyond the model's embedding: the tokenizer has 301 tokens, the embedding 300"


@pytest.fixture(scope="module")
def grown(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model; its tokenizer got a token, which fills rows, too, and the embedding did not grow."""
    folder = tmp_path_factory.mktemp("grown") / "model"
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([NEW])
    tokenizer.pad_token = NEW
    tokenizer.save_pretrained(folder)
    return folder


def config_of(make: MakeConfig, model: Path, text: str, tmp_path: Path) -> AnalyzeConfig:
    source = tmp_path / "text.jsonl"
    source.write_text(json.dumps({"text": text}) + "\n")
    return make(tmp_path / "runs", model={"id": str(model)}, corpus={"source": {"prose": str(source)}})


def quiet(_line: str) -> None:
    pass


def test_text_without_the_token_is_analysed_though_the_pad_token_has_no_row(
    grown: Path, analyze_config: MakeConfig, tmp_path: Path
) -> None:
    found = analyze(config_of(analyze_config, grown, "river water stone bridge " * 20, tmp_path), quiet)
    receipts = [Receipt.read(path.read_bytes(), str(path)) for path in tmp_path.rglob("receipts/*.json")]
    assert found.is_new
    assert any(receipt.shard.num_tokens % (4 * 16) for receipt in receipts)  # the last batch was filled up


def test_text_with_the_token_ends_the_run_while_it_is_prepared(
    grown: Path, analyze_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=LINE):
        analyze(config_of(analyze_config, grown, f"river {NEW} stone", tmp_path), quiet)
    assert not list(tmp_path.rglob("shards/*"))


def test_text_that_a_larger_model_prepared_ends_the_run_at_the_forward(
    grown: Path, analyze_config: MakeConfig, tmp_path: Path
) -> None:
    larger = shutil.copytree(grown, tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS + 1}))
    tensors = {k: v.clone() for k, v in load_file(larger / "model.safetensors").items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, larger / "model.safetensors", metadata={"format": "pt"})
    text = f"river {NEW} stone"
    analyze(config_of(analyze_config, larger, text, tmp_path), quiet)
    asked = config_of(analyze_config, grown, text, tmp_path)
    with pytest.raises(ConfigError, match=LINE):
        analyze(asked.model_copy(update={"catalog": asked.catalog.model_copy(update={"name": "other"})}), quiet)


def test_requests_prompts_and_ids_with_the_token_are_refused_at_every_door(
    grown: Path, sae_dirs: dict[str, Path]
) -> None:
    model: dict[str, Any] = {"id": str(grown), "dtype": "float32", "device": "cpu"}
    saes = [{"path": str(sae_dirs["late"])}]
    discoverer = open_discoverer(DiscoveryConfig(model=model, saes=saes, threads=1, cache_mb=0))
    good, bad = (DiscoverRequest(text=text, min_coverage_pct=0.0) for text in ("river stone", f"river {NEW}"))
    with pytest.raises(RequestError, match=LINE) as error:
        discoverer.discover(bad)
    assert error.value.field == "text"
    answers = discoverer.discover_many([bad, good, DiscoverRequest(text="river stone " * 3, min_coverage_pct=0.0)])
    assert [type(answer).__name__ for answer in answers] == ["RequestError", "Discovery", "Discovery"]
    edit = {"feature": 1, "value": 2.0}
    with pytest.raises(ConfigError, match=LINE):
        steer(SteerConfig(model=model, saes=saes, prompt=NEW, edits=[edit], threads=1))
    inner, tokenizer = AutoModelForCausalLM.from_pretrained(grown), AutoTokenizer.from_pretrained(grown)
    sae = load_sae(str(sae_dirs["late"]))
    with pytest.raises(ConfigError, match=LINE):
        encode_prompts(inner, tokenizer, sae, ["river", NEW], layer_idx=1)
    loaded = LanguageModel(str(grown), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=LINE):
        trace_feature(0, 1, loaded, torch.tensor([1, ROWS]), sae)
