"""How `old_store.zip` was made, by the last tree whose records had no digest of their own.

That tree is commit bac1e58, whose package was `pipeline`, with `config`, `flows.analyze` and `flows.compact` in it;
with these names below, it as the working directory, and its environment:

    PYTHONPATH=.:tests python …/tests/data/make_old_store.py old_store.zip

It holds a model, its tokenizer, an SAE, two texts, and under `runs` what the main job made of the first of them: a
catalog `old` in two snapshots, of measure format 3 and preparation format 1, compacted without pruning. Its numerics
are mixed, so that machines of any kind go on with it.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import conftest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_census.config import AnalyzeConfig
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.compact import compact


def make_model(folder: Path) -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([*conftest.TOPICS] * 4, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_sae(folder: Path) -> None:
    conftest.WIDTH = 8
    kind = {"architecture": "topk", "k": 3, "normalize_activations": "none", "apply_b_dec_to_input": True}
    conftest._write_sae(folder, kind, layer=0, num_features=12, seed=3)


def make_config(root: Path) -> AnalyzeConfig:
    return AnalyzeConfig(
        model={"id": str(root / "model"), "dtype": "float32", "device": "cpu"},
        saes=[{"path": str(root / "sae")}],
        corpus={"source": str(root / "texts" / "*.jsonl"), "context_length": 12, "shard_tokens": 96},
        sampling={"top": 3, "random": 2, "bands": 2, "per_band": 2, "low_activating": 1, "non_activating": 1,
                  "silent": 4},
        batch={"contexts": 4},
        cluster={"executor": "inline", "threads_per_worker": 1, "mixed_numerics": True},
        store={"root": str(root / "runs")},
        catalog={"name": "old"},
        preflight="off",
    )  # fmt: skip


def main(target: Path) -> None:
    root = Path(tempfile.mkdtemp())
    make_model(root / "model")
    make_sae(root / "sae")
    (root / "texts").mkdir()
    conftest.write_corpus(root / "texts" / "a.jsonl", seed=5, num_documents=5, bad_lines=("{oops",))
    config = make_config(root)
    analyze(config, print)
    compact(root / "runs", "old")
    analyze(config.model_copy(update={"ranking": config.ranking.model_copy(update={"score": "max"})}), print)
    shutil.rmtree(root / "runs" / "scratch", ignore_errors=True)
    conftest.write_corpus(root / "texts" / "b.jsonl", seed=6, num_documents=4)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            archive.write(path, path.relative_to(root).as_posix())
    shutil.rmtree(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
