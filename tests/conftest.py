"""A tiny world, made without a network: a random llama, its tokenizer, two SAEs and a corpus in two slices."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from sae_census.cli import main
from sae_census.config import AnalyzeConfig
from sae_census.records import unsealed
from sae_census.steps.store.manifests import Manifest, content_digest

WIDTH, LAYERS, VOCABULARY = 32, 3, 300
TOPICS = (
    "river water stone bridge flows under cold boat",
    "def return value list for index print None",
    "mother bread kitchen sugar evening old café Zürich",
    "number sum total mean 12 7 2024 0.5 🙂 naïve 日本 🚀",
)
BOILERPLATE = "All rights reserved by the bridge company. Read the list of names before you return."

LONGEST = ("cluster", "classes", "nodes", "namespaces", "laws", "compact", "discover_cli")
"""Test files that take the most time, the longest first: two processes that share the suite start with them."""

MakeConfig = Callable[..., AnalyzeConfig]
Cli = Callable[..., tuple[int, str, str]]
# Ray's client server needs it, and a process that has once used Ray does not notice a change: its next cluster would
# take it for dead and end its actors.
os.environ["RAY_AUTH_MODE"] = "disabled"

# Drawn tests draw the same in every run; a seed, --hypothesis-seed=N or =random, lets them explore.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", derandomize=False, database=None, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("same" if config.getoption("hypothesis_seed") is None else "explore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def sentences(rng: random.Random, num_words: int) -> str:
    """Words of one topic with a few strays, so that features find structure."""
    topic = rng.choice(TOPICS).split()
    strays = " ".join(TOPICS).split()
    words = [rng.choice(topic if rng.random() < 0.8 else strays) for _ in range(num_words)]
    return " ".join(word + rng.choice(("", "", "", ",", ".", "\n")) for word in words)


def write_corpus(path: Path, seed: int, num_documents: int, bad_lines: tuple[str, ...] = ()) -> None:
    """A jsonl file of short, middling and long documents; some equal each other, some lines are bad."""
    rng = random.Random(seed)
    texts = [sentences(rng, rng.choice((1, 2, 5, 9, 20, 60))) for _ in range(num_documents)]
    texts[1::5] = [BOILERPLATE] * len(texts[1::5])
    texts[0] = "é"
    lines = [json.dumps({"text": text, "id": i}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    for line in bad_lines:
        lines.insert(rng.randrange(len(lines)), line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a snapshot's manifest and seal it again, as whoever made it otherwise would have."""
    content, _ = unsealed(path.read_bytes(), str(path))
    change(content)
    changed = Manifest.model_validate(content)
    digest = content_digest(changed.files, changed.facts)
    path.write_bytes(changed.model_copy(update={"digest": digest}).to_bytes())


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs `sae-census` with what one types after it, in a folder of its own; exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sae-census", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prose.jsonl (clean) and notes.jsonl (three bad lines)."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "prose.jsonl", seed=1, num_documents=24)
    write_corpus(folder / "notes.jsonl", seed=2, num_documents=12, bad_lines=("{oops", '{"id": 3}', '{"text": " "}'))
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 3 layers with random weights, and a byte-level BPE of 300 tokens that adds a BOS itself."""
    folder = tmp_path_factory.mktemp("model")
    logging.disable_progress_bar()
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*TOPICS, BOILERPLATE] * 4, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sinky_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but the tokens of "e" and "." are attention sinks: long by one dimension, and far longer."""
    folder = tmp_path_factory.mktemp("sinky") / "model"
    model = LlamaForCausalLM.from_pretrained(model_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    for text, size in (("e", 40.0), (".", 2000.0)):
        (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        model.model.embed_tokens.weight.data[token, 3] = size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sae_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`early`, a JumpReLU of 64 features on normalised layer 0, and `late`, a top-8 of 96 on layer 1."""
    folder = tmp_path_factory.mktemp("saes")
    early = {"architecture": "jumprelu", "normalize_activations": "layer_norm", "apply_b_dec_to_input": False}
    late = {"architecture": "topk", "k": 8, "normalize_activations": "none", "apply_b_dec_to_input": True}
    return {
        "early": _write_sae(folder / "early", early, layer=0, num_features=64, seed=3),
        "late": _write_sae(folder / "late", late, layer=1, num_features=96, seed=4),
    }


def _write_sae(folder: Path, config: dict[str, Any], *, layer: int, num_features: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w_dec = torch.nn.functional.normalize(normal(num_features, WIDTH), dim=1)
    tensors = {
        # gains over four octaves, so that strong, weak and rare features all occur
        "W_enc": (w_dec.T * torch.exp2(4 * torch.rand(num_features, generator=generator) - 2)).contiguous(),
        "W_dec": w_dec,
        "b_enc": 0.1 * normal(num_features),
        "b_dec": 0.1 * normal(WIDTH),
    }
    tensors["b_enc"][5:8] = -1000.0  # dead features
    if config["architecture"] == "jumprelu":
        tensors["threshold"] = torch.rand(num_features, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    sizes = {"d_in": WIDTH, "d_sae": num_features, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(config | sizes | {"metadata": metadata}))
    return folder


@pytest.fixture(scope="session")
def analyze_config(model_dir: Path, sae_dirs: dict[str, Path], corpus_dir: Path) -> MakeConfig:
    """Makes a config of the tiny world with its store at `root`; sections override by key.

    `analyze_config(root, corpus={"packing": "document"})` changes one key and keeps the other defaults.
    """

    def make(root: Path, **overrides: Any) -> AnalyzeConfig:
        source = {"notes": str(corpus_dir / "notes*.jsonl"), "prose": str(corpus_dir / "prose*.jsonl")}
        sections: dict[str, Any] = {
            "model": {"id": str(model_dir), "dtype": "float32", "device": "cpu"},
            "saes": [{"path": str(sae_dirs[name])} for name in ("late", "early")],
            # 10 contexts a shard in batches of 4: the last batch of a shard is ragged
            "corpus": {"source": source, "context_length": 16, "shard_tokens": 160},
            "sampling": {
                "top": 6,
                "random": 4,
                "bands": 3,
                "per_band": 3,
                "low_activating": 3,
                "non_activating": 3,
                "silent": 5,
            },
            "batch": {"contexts": 4},
            "cluster": {"executor": "inline", "threads_per_worker": 1},
            "store": {"root": str(root)},
            "preflight": "off",
        }
        for name, value in overrides.items():
            both = isinstance(value, dict) and isinstance(sections.get(name), dict)
            sections[name] = sections[name] | value if both else value
        return AnalyzeConfig(**sections)

    return make
