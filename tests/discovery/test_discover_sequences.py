"""Sequences of discovery: continuations, positions and characters, special tokens, long texts, chat templates."""

import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, WIDTH
from dense_discovery import twin
from discovery_bench import TEXT, Bench, ask, bare, bench, gates, ids_of, of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sae_census.config import DiscoverRequest, SaeConfig
from sae_census.errors import RequestError
from sae_census.findings import Discovery
from sae_census.io.model import generation
from sae_census.io.model.language_model import LanguageModel


def hf_greedy(bench: Bench, prompt: str, num_tokens: int) -> list[int]:
    """Greedy continuation by whole forward passes, one token at a time, up to an end token."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < num_tokens:
        with torch.inference_mode():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return new


def test_a_prompt_is_continued_greedily_and_both_are_analysed(bench, bare):
    options = {"gen_tokens": 20, "min_coverage_pct": 0.05, "topk_tokens_per_seq": 10}
    new = hf_greedy(bench, "river water", 20)
    answer = ask(bare, prompt="river water", **options)
    ids = ids_of(bench, "river water") + new
    expected = twin(bench, ids, options)
    assert answer.analyzed.mode == "prompt+gen"
    assert (answer.analyzed.tokens, answer.analyzed.tokens_generated) == (len(ids), len(new))
    assert answer.analyzed.generation == "greedy"
    assert [of(f) for f in answer.features] == [one["key"] for one in expected.rankings[0]]
    decoded = AutoTokenizer.from_pretrained(bench.model).decode(ids[1:])
    assert answer.analyzed.text == decoded
    assert answer.analyzed.text.startswith("river water")
    for feature in answer.features:
        for span in feature.top_spans:
            assert span.text == answer.analyzed.text[slice(*span.char)]
            assert span.char[0] <= span.char[1]


def test_a_prompt_that_is_not_continued_is_as_the_text(bare):
    text, prompt = ask(bare, text=TEXT), ask(bare, prompt=TEXT, generate=False)
    assert prompt.analyzed.mode == "prompt"
    assert prompt.analyzed.generation is None
    assert prompt.features == text.features


def test_sampling_is_reproducible_and_hangs_on_its_seed(bare):
    def text(**fields: Any) -> str:
        return ask(bare, prompt="river", gen_tokens=24, do_sample=True, **fields).analyzed.text

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=seed) for seed in range(4)}) == 4
    assert text(seed=1, temperature=1e-4) == ask(bare, prompt="river", gen_tokens=24).analyzed.text
    assert text(seed=2, top_p=1e-9) == ask(bare, prompt="river", gen_tokens=24).analyzed.text
    assert len({ask(bare, prompt="river", gen_tokens=24, seed=seed).analyzed.text for seed in range(3)}) == 1


def test_sampling_follows_the_probabilities_of_the_model(bench, bare):
    ids = ids_of(bench, "river")
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(dim=0).numpy()
    likely = np.argsort(-p)[:3]
    loaded = LanguageModel(str(bench.model), dtype=torch.float32, device=torch.device("cpu"))
    num = 400
    first = [
        generation.generate(loaded, [ids], pad_id=0, max_new_tokens=1, do_sample=True, seed=seed) for seed in range(num)
    ]
    drawn = np.bincount([new[0][0] if new[0] else 2 for new in first], minlength=len(p))
    for token in likely:
        assert abs(drawn[token] - num * p[token]) < 5 * math.sqrt(num * p[token] * (1 - p[token]))


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.5, "top_p": 0.5, "top_k": 2},
        {"repetition_penalty": 9.0},
        {"num_beams": 3},
        {"suppress_tokens": list(range(3, 250))},
        {"max_time": 1e-9},
        {"stop_strings": ["a"]},
    ],
    ids=lambda own: next(iter(own)),
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_checkpoints_own_generation_settings_change_nothing(own, do_sample, bench, bare, tmp_path):
    shutil.copytree(bench.model, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    other = Bench(model=tmp_path / "model", saes=bench.saes).open()
    fields = {"prompt": "river water", "gen_tokens": 16, "do_sample": do_sample}
    assert ask(other, **fields).analyzed.text == ask(bare, **fields).analyzed.text


def test_generation_stops_at_every_end_token_of_the_checkpoint(bench, bare, tmp_path):
    free = hf_greedy(bench, "river water", 12)
    shutil.copytree(bench.model, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, free[5]]}))
    other = Bench(model=tmp_path / "model", saes=bench.saes).open()
    many = other.discover_many(
        [DiscoverRequest(prompt=prompt, gen_tokens=12) for prompt in ("river water", "stone", "mother bread")]
    )
    assert many[0].analyzed.tokens_generated == free.index(free[5])
    assert ask(other, prompt="river water", gen_tokens=12).analyzed.tokens_generated == free.index(free[5])


def test_a_continuation_keeps_the_space_before_its_first_word(tmp_path, bench, gates):
    """Of a tokenizer whose decoder strips the space at the start of a text, as those of Llama 2 do."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["▁river▁water▁stone"] * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    new = fast.convert_tokens_to_ids(["▁", *"water", "▁", "<0xC3>", "<0xA9>", "▁", *"stone"])
    assert fast.unk_token_id not in new

    def generate(*_: Any, **__: Any) -> list[list[int]]:
        return [new]

    discoverer = Bench(model=tmp_path / "model", saes=(SaeConfig(path=str(gates["standard"])),)).open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate", generate)
        answer = ask(discoverer, prompt="river", gen_tokens=30, min_coverage_pct=0.0)
    assert answer.analyzed.text == "river water é stone"


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "é",
        "🙂",
        "👩‍👩‍👧 and 日本",
        "שלום עולם",
        "a\0b",
        "\n\n\t",
        "e\u0301\u0301",
        "\ufeffx",
        "\u202eabc",
        "x" * 60,
    ],
)
def test_positions_and_characters_point_at_the_text_whatever_it_is(text, bare, bench):
    answer = ask(bare, text=text, min_coverage_pct=0.0, return_top_x=200)
    assert answer.analyzed.text == text
    assert answer.analyzed.tokens == len(ids_of(bench, text))
    assert answer.features
    for feature in answer.features:
        for span in feature.top_spans:
            start, stop = span.position
            assert 0 <= start <= span.peak < stop <= answer.analyzed.tokens
            assert text[slice(*span.char)] == span.text


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), st.booleans())
def test_any_text_has_an_answer_that_is_valid_json(bare, text, is_prompt):
    fields = {"prompt": text, "gen_tokens": 4} if is_prompt else {"text": text}
    answer = ask(bare, min_coverage_pct=0.0, **fields)
    assert answer.analyzed.text.startswith(text)
    again = json.loads(json.dumps(answer.model_dump(), allow_nan=False))
    assert Discovery.model_validate(again) == answer
    assert all(span.text == answer.analyzed.text[slice(*span.char)] for f in answer.features for span in f.top_spans)


def test_special_tokens_are_never_kept(bare):
    answer = ask(bare, text="river<s></s><pad>", token_filter="none", min_coverage_pct=0.0, return_top_x=200)
    assert answer.analyzed.tokens_kept == answer.analyzed.tokens - 4
    peaks = {span.peak for feature in answer.features for span in feature.top_spans}
    assert max(peaks) == answer.analyzed.tokens - 4
    assert 0 not in peaks

    nothing = ask(bare, text="</s>", min_coverage_pct=0.0)
    assert nothing.features == []
    assert any("no token was kept" in note for note in nothing.analyzed.notes)


def test_a_long_text_is_refused_or_cut_and_counted(bare, bench):
    long = "river 🙂 water " * 40
    num_tokens = len(ids_of(bench, long))
    with pytest.raises(RequestError, match=f"text has {num_tokens} tokens, and there is room for 64") as caught:
        ask(bare, text=long)
    assert caught.value.field == "text"
    cut = ask(bare, text=long, truncate=True, min_coverage_pct=0.0)
    assert (cut.analyzed.tokens, cut.analyzed.tokens_truncated) == (64, num_tokens - 64)
    assert long.startswith(cut.analyzed.text)
    assert all(span.text == long[slice(*span.char)] for f in cut.features for span in f.top_spans)
    both = ask(bare, prompt=long, truncate=True, gen_tokens=60)
    assert both.analyzed.tokens - both.analyzed.tokens_generated == 4
    with pytest.raises(RequestError, match="room for 0"):
        ask(bare, prompt=long, truncate=True, gen_tokens=64)
    assert ask(bare, text="x" * 63).analyzed.tokens == 64
    with pytest.raises(RequestError):
        ask(bare, text="x" * 64)


def test_a_chat_template_wraps_the_prompt(bench, bare, tmp_path):
    shutil.copytree(bench.model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{{ bos_token }}user: {{ messages[0].content }}{% if add_generation_prompt %} bot:{% endif %}"
    )
    other = Bench(model=tmp_path / "model", saes=bench.saes).open()
    wrapped = ask(other, prompt="river", generate=False, chat_template=True)
    assert wrapped.analyzed.text == "<s>user: river bot:"
    assert wrapped.analyzed.tokens == len(ids_of(bench, "user: river bot:")), "one BOS, not two"
    for discoverer, fields in ((bare, {"prompt": "river"}), (other, {"text": "river"})):
        with pytest.raises(RequestError) as caught:
            ask(discoverer, chat_template=True, gen_tokens=4, **fields)
        assert caught.value.field == "chat_template"
