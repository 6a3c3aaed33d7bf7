"""A GGUF file is converted whole or not at all, and what a cache holds is not believed blindly."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType, TokenType

from sae_census.errors import CheckpointError
from sae_census.io.model.language_model import LanguageModel, model_facts

WIDTH, ROWS, INNER = 32, 64, 48
Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2)

    block = {
        "attn_norm": normal(WIDTH),
        "attn_q": normal(WIDTH, WIDTH),
        "attn_k": normal(WIDTH // 2, WIDTH),
        "attn_v": normal(WIDTH // 2, WIDTH),
        "attn_output": normal(WIDTH, WIDTH),
        "ffn_norm": normal(WIDTH),
        "ffn_gate": normal(INNER, WIDTH),
        "ffn_up": normal(INNER, WIDTH),
        "ffn_down": normal(WIDTH, INNER),
    }
    return {"token_embd.weight": normal(ROWS, WIDTH), "output_norm.weight": normal(WIDTH)} | {
        f"blk.0.{name}.weight": array for name, array in block.items()
    }


def write(path: Path, tensors: Arrays, scaling: RopeScalingType | None = None) -> Path:
    """A llama of one block with a tied head and a byte-level tokenizer."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // 4)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    writer.add_vocab_size(ROWS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = [chr(65 + i) for i in range(ROWS - 3)]
    writer.add_token_list(["<s>", "</s>", *letters, "ab"])
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (ROWS - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def load(path: Path) -> LanguageModel:
    return LanguageModel(str(path), dtype=torch.float32, device=torch.device("cpu"))


def test_a_whole_file_is_converted_once_and_its_conversion_is_proved(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "whole.gguf", arrays())
    model = load(path)
    up = model.inner.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(up, torch.from_numpy(arrays()["blk.0.ffn_up.weight"]), rtol=0, atol=0)
    assert not model.is_headless
    (folder,) = cache.iterdir()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    digest = model_facts(str(path)).digest
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="was changed or damaged: remove that folder"):
        model_facts(str(path))
    folder.rename(folder.with_name(folder.name.rpartition("-")[0]))  # what an older version left has no such proof
    assert model_facts(str(path)).digest == digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {k: v for k, v in found.items() if "ffn_up" not in k}, r"1 missing: .*mlp\.up_proj\.weight"),
        (lambda found: {k: v for k, v in found.items() if "embd" not in k}, "missing"),
        (lambda found: found | {"rope_freqs.weight": np.ones(4, np.float32)}, r"not read .*: rope_freqs\.weight; what"),
        (lambda found: found | {"blk.0.attn_q.bias": np.ones(WIDTH, np.float32)}, r"not read .*: blk\.0\.attn_q\.bias"),
        (lambda found: found | {"blk.1.ffn_up.weight": found["blk.0.ffn_up.weight"]}, r"not read .*: blk\.1\.ffn_up"),
        (lambda found: found | {"output_norm.weight": np.full(WIDTH, np.nan, np.float32)}, r"NaN or infinite values"),
        (lambda found: found | {"blk.0.ffn_up.weight": np.ones((INNER + 8, WIDTH), np.float32)}, "1 of another size"),
    ],
    ids=["lacks one", "no embedding", "rope", "bias", "more blocks", "nan", "size"],
)
def test_a_file_with_gaps_is_refused_and_nothing_is_cached(
    change: Callable[[Arrays], Arrays], message: str, cache: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "other.gguf", change(arrays()))
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert not cache.exists() or not list(cache.iterdir())


def test_positions_that_the_file_stretches_and_the_converter_does_not_are_refused(cache: Path, tmp_path: Path) -> None:
    load(write(tmp_path / "plain.gguf", arrays(), RopeScalingType.NONE))
    with pytest.raises(CheckpointError, match=r"llama\.rope\.scaling\.type is linear"):
        load(write(tmp_path / "long.gguf", arrays(), RopeScalingType.LINEAR))
    assert len(list(cache.iterdir())) == 1
