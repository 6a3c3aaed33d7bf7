"""Centred writing weights: predictions stay, the residual stream loses its mean, and the model is another one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_census import encode_prompts, steer
from sae_census.config import DiscoveryConfig, ModelConfig, SaeConfig, SteerConfig
from sae_census.errors import ConfigError
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.io.model.centring import center_writing_weights, is_centred
from sae_census.io.model.hooks import Captures, layout_of
from sae_census.io.model.language_model import LanguageModel
from sae_census.steps.model.parts import facts_of
from sae_census.types import HookPoint

TINY = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "n_inner": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = {
    "gpt2": ("gpt2", {}),
    "gpt2 with a head of its own": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "phi": ("phi", {}),
}
WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def tiny(kind: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of a family, no weight of it zero, with the tokenizer of the tiny world."""
    family, changes = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) + 0.1)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def seen(model: LanguageModel) -> tuple[dict[HookPoint, torch.Tensor], torch.Tensor]:
    blocks, taps = layout_of(model.inner)
    points = [HookPoint(layer, stream) for layer in range(2) for stream in taps]
    with torch.inference_mode(), Captures(blocks, taps, points) as captures:
        got, _ = captures.run_whole(model.inner.base_model, IDS)
        return got, model.inner(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_centring_takes_the_mean_off_the_stream_and_changes_no_prediction(
    kind: str, model_dir: Path, tmp_path: Path
) -> None:
    folder = str(tiny(kind, tmp_path / "model", model_dir))
    cpu = torch.device("cpu")
    plain = LanguageModel(folder, dtype=torch.float32, device=cpu)
    centred = LanguageModel(folder, dtype=torch.float32, device=cpu, center_writing_weights=True)
    (before, logits), (after, same) = seen(plain), seen(centred)
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-4)
    for point, x in before.items():
        expected = x - x.mean(dim=-1, keepdim=True) if point.stream in WRITTEN else x
        assert x.mean(dim=-1).abs().max() > 0.01
        torch.testing.assert_close(after[point], expected, rtol=1e-4, atol=1e-4)
    assert (is_centred(plain.inner), is_centred(centred.inner)) == (False, True)


def test_a_model_without_layer_norms_is_refused_by_name(model_dir: Path) -> None:
    message = "center_writing_weights is true, but llama reads its residual stream through norms that take no mean off"
    with pytest.raises(ConfigError, match=message):
        facts_of(ModelConfig(id=str(model_dir), center_writing_weights=True))
    with pytest.raises(ConfigError, match=message):
        center_writing_weights(AutoModelForCausalLM.from_pretrained(model_dir))


def test_whoever_reads_an_sae_of_centred_weights_from_another_model_is_told(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = str(tiny("gpt2", tmp_path / "model", model_dir))
    (tmp_path / "sae").mkdir()
    parts = {
        "W_enc": torch.rand(16, 24),
        "b_enc": torch.zeros(24),
        "W_dec": torch.rand(24, 16),
        "b_dec": torch.ones(16),
    }
    save_file(parts, tmp_path / "sae" / "sae_weights.safetensors")
    said = {"hook_name": "blocks.1.hook_resid_pre", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    config = {"architecture": "standard", "d_in": 16, "d_sae": 24, "metadata": said}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    saes = (SaeConfig(path=str(tmp_path / "sae")),)
    for centred in (False, True):
        caplog.clear()
        how = ModelConfig(id=model, dtype="float32", device="cpu", center_writing_weights=centred)
        loaded = open_discoverer(DiscoveryConfig(model=how, saes=saes, cache_mb=0))._loaded
        edits = ({"feature": 1, "value": 2.0},)
        steer(SteerConfig(model=how, saes=saes, prompt="river", edits=edits, generate={"max_new_tokens": 1}))
        reader, tokenizer = loaded.reader, AutoTokenizer.from_pretrained(model)
        encode_prompts(reader.model.inner, tokenizer, next(iter(reader.loaded.values())), ["river"], 1)
        told = [one.getMessage() for one in caplog.records if "centred writing weights" in one.getMessage()]
        assert len(told) == (0 if centred else 3)
        assert loaded.model_digest == facts_of(how).digest


def test_a_centred_model_has_an_identity_of_its_own_and_the_other_keeps_its_own(
    model_dir: Path, tmp_path: Path
) -> None:
    folder = tiny("gpt2", tmp_path / "model", model_dir)
    plain = facts_of(ModelConfig(id=str(folder)))
    centred = facts_of(ModelConfig(id=str(folder), center_writing_weights=True))
    assert plain.digest == facts_of(ModelConfig.model_validate({"id": str(folder)})).digest != centred.digest
    assert plain.num_layers == centred.num_layers
