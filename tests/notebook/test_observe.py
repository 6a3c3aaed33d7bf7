"""Observation of prompts: the document's loop is the law, batches change nothing, and nothing is ever changed."""

import copy
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grimp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sae_census
from sae_census.compute.notebook.prompts import strongest_features
from sae_census.compute.numbers.codes import Codes
from sae_census.compute.numbers.sae import TopK
from sae_census.errors import ConfigError
from sae_census.flows.notebook import observe
from sae_census.flows.notebook.observe import (
    FeatureRanking,
    SetSums,
    capture_residual,
    differential_features,
    encode_prompts,
    fire_rate,
    observe_prompts,
    pretty_ranking,
    scan_prompts_for_feature,
    top_features_for_prompt,
)
from sae_census.io.checkpoints import LoadedSae, load_sae

LAYER, WIDTH, F, K = 1, 32, 60, 45
PROMPTS = [
    "river water stone",
    "mother bread kitchen sugar evening old café Zürich",
    "def",
    "number sum total mean 12 7 2024 0.5 🙂 naïve 日本 🚀 " * 2,
    "return value list for index print None",
    "a",
]
AGREES = {"rtol": 0, "atol": 1e-4}
"""`observe_prompts` promises 1e-4 of the largest code, which is about 9 here."""


@pytest.fixture(scope="module")
def model(model_dir: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random weights in Qwen-Scope's layout; k = 45 of 60, so that many codes are negative."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (F, WIDTH), "W_dec": (WIDTH, F), "b_enc": (F,), "b_dec": (WIDTH,)}
    return {name: 0.1 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def sae(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> LoadedSae:
    folder = tmp_path_factory.mktemp("scope") / f"SAE-Res-tiny-W1K-L0_{K}"
    folder.mkdir()
    for layer in range(3):
        torch.save(weights | {"b_enc": weights["b_enc"] * (layer == LAYER)}, folder / f"layer{layer}.sae.pt")
    return load_sae(str(folder / f"layer{LAYER}.sae.pt"))


def literal_codes(model, tokenizer, weights: dict[str, Tensor], prompts: list[str]) -> np.ndarray:
    """The document's loop in float64 after the model: one prompt at a time, the last token, no hooks of ours."""
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            seen = model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True)
        h = seen.hidden_states[LAYER + 1][0, -1].double().numpy()
        pre = weights["W_enc"].double().numpy() @ h + weights["b_enc"].double().numpy()
        best = np.argsort(-pre, kind="stable")[:K]
        rows.append(np.where(np.isin(np.arange(F), best), pre, 0))
    return np.stack(rows)


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_any_batch_of_mixed_lengths_gives_the_codes_of_one_prompt_at_a_time(
    batch_size, padding_side, model, tokenizer, sae, weights, monkeypatch
):
    monkeypatch.setattr(tokenizer, "padding_side", padding_side)
    expected = literal_codes(model, tokenizer, weights, PROMPTS)
    codes = encode_prompts(model, tokenizer, sae, PROMPTS, LAYER, batch_size=batch_size)
    assert (codes.shape, codes.dtype, codes.device.type) == ((len(PROMPTS), F), torch.float32, "cpu")
    assert 1 < np.abs(expected).max() < 20
    np.testing.assert_allclose(codes.numpy(), expected, **AGREES)
    assert ((codes != 0).sum(dim=1) == K).all()


def test_no_padding_token_is_needed(model, model_dir, sae, weights):
    tokenizer = AutoTokenizer.from_pretrained(model_dir, pad_token=None)
    assert tokenizer.pad_token is None
    expected = literal_codes(model, tokenizer, weights, PROMPTS)
    np.testing.assert_allclose(encode_prompts(model, tokenizer, sae, PROMPTS, LAYER), expected, **AGREES)


def test_negative_codes_are_seen_here_and_do_not_fire_in_the_census(model, tokenizer, sae):
    seen = observe_prompts(model, tokenizer, sae, PROMPTS, LAYER)
    assert sae.sae.gate == TopK(K, "identity")
    assert (seen.codes.value < 0).any()
    with capture_residual(model, LAYER) as bucket, torch.no_grad():
        model(**tokenizer(PROMPTS[0], return_tensors="pt"))
    assert (sae.sae.encode(bucket["h"]).value > 0).all()


def test_the_codes_of_a_prompt_are_those_of_the_census_at_its_last_token(model, tokenizer, sae_dirs):
    sae = load_sae(str(sae_dirs["late"]))
    codes = encode_prompts(model, tokenizer, sae, PROMPTS, LAYER)
    assert torch.equal(codes, encode_prompts(model, tokenizer, sae.sae, PROMPTS, LAYER))
    for row, prompt in enumerate(PROMPTS):
        with capture_residual(model, LAYER) as bucket, torch.no_grad():
            model(**tokenizer(prompt, return_tensors="pt"))
        all_codes = sae.sae.encode(bucket["h"])
        last = all_codes.where(all_codes.position == bucket["h"].shape[1] - 1)
        assert codes[row].nonzero().flatten().tolist() == last.feature.tolist()
        np.testing.assert_allclose(codes[row][last.feature], last.value, rtol=1e-4)


def test_a_half_precision_model_meets_a_float32_sae(model_dir, tokenizer, sae, weights):
    half = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    codes = encode_prompts(half, tokenizer, sae, PROMPTS, LAYER, batch_size=1)
    assert codes.dtype == torch.float32
    np.testing.assert_allclose(codes, literal_codes(half, tokenizer, weights, PROMPTS), **AGREES)


def test_an_sae_of_another_stream_reads_its_own_stream(model, tokenizer, sae):
    other = replace(sae, hook_point=sae_census.HookPoint(LAYER, "mlp_out"))
    seen = observe_prompts(model, tokenizer, other, PROMPTS, LAYER)
    assert seen.hook_point == f"blocks.{LAYER}.hook_mlp_out"
    bucket = {}
    handle = model.model.layers[LAYER].mlp.register_forward_hook(lambda _m, _a, out: bucket.update(h=out))
    with torch.no_grad():
        model(**tokenizer(PROMPTS[-1], return_tensors="pt"))
    handle.remove()
    expected = other.sae.encode(bucket["h"][:, -1:], signed=True)
    mine = seen.codes.where(seen.codes.row == len(PROMPTS) - 1)
    assert mine.feature.tolist() == expected.feature.tolist()
    np.testing.assert_allclose(mine.value, expected.value, atol=1e-4)


SMALL = {
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "initializer_range": 0.3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SCOPED = {
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID | EXPERTS | {"shared_expert_intermediate_size": 8},
}


@pytest.mark.parametrize("family", SCOPED)
def test_the_families_of_qwen_scope_are_read_alone_and_in_batches(family, tokenizer, sae, weights):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(family, **SMALL, **SCOPED[family])
        qwen = AutoModelForCausalLM.from_config(config).eval()
    expected = literal_codes(qwen, tokenizer, weights, PROMPTS)
    codes = encode_prompts(qwen, tokenizer, sae, PROMPTS, LAYER)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# ---- it only reads


def test_nothing_is_changed_and_nothing_generated(model, tokenizer, sae, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("generate was called")

    monkeypatch.setattr(type(model), "generate", never)
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = num_hooks(model)
    modes = [module.training for module in model.modules()]
    encode_prompts(model, tokenizer, sae, PROMPTS, LAYER)
    top_features_for_prompt(model, tokenizer, sae, PROMPTS[0], LAYER)
    with capture_residual(model, LAYER), torch.no_grad():
        during = model(**inputs).logits
    with torch.no_grad():
        after = model(**inputs).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert num_hooks(model) == hooks


def test_hooks_are_gone_after_an_exception(model, tokenizer, sae, monkeypatch):
    hooks = num_hooks(model)  # transformers keeps some of its own once hidden states were asked for

    def breaks(*_args, **_kwargs):
        assert num_hooks(model) == hooks + 1
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.layers[0], "forward", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode_prompts(model, tokenizer, sae, PROMPTS, LAYER)
    assert num_hooks(model) == hooks
    with pytest.raises(RuntimeError, match="out of memory"), capture_residual(model, LAYER):
        model(**tokenizer("a", return_tensors="pt"))
    assert num_hooks(model) == hooks


def test_capture_residual_gives_the_output_of_the_block_of_every_pass(model, tokenizer):
    for layer in range(2):
        with capture_residual(model, layer) as bucket, torch.no_grad():
            assert bucket == {}
            for prompt in PROMPTS[:2]:
                seen = model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True)
                assert torch.equal(bucket["h"], seen.hidden_states[layer + 1])


def test_capture_residual_takes_the_first_of_a_tuple(model, tokenizer, monkeypatch):
    block = model.model.layers[LAYER]
    whole = block.forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: (whole(*args, **kwargs), "cache"))
    with capture_residual(model, LAYER) as bucket, torch.no_grad(), pytest.raises((TypeError, AttributeError)):
        model(**tokenizer("a", return_tensors="pt"))  # this family's next block cannot take a tuple
    assert bucket["h"].shape == (1, len(tokenizer("a")["input_ids"]), WIDTH)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(layer, model, tokenizer, sae):
    with pytest.raises(ConfigError, match=rf"asks for layer {layer}, but the model has layers 0 to 2"):
        encode_prompts(model, tokenizer, sae.sae, PROMPTS, layer)
    with pytest.raises(ConfigError, match=rf"asks for layer {layer}"), capture_residual(model, layer):
        pass


def what_steers(graph: grimp.ImportGraph) -> set[str]:
    """Modules reachable from the observation flow that could change an activation."""
    reached = graph.find_upstream_modules("sae_census.flows.notebook.observe")
    return {name for name in reached if re.search(r"steer|edit|interven|patch", name)}


def test_nothing_that_steers_can_be_reached_by_imports():
    graph = grimp.build_graph("sae_census")
    assert "sae_census.io.model.hooks" in graph.find_upstream_modules("sae_census.flows.notebook.observe")
    assert what_steers(graph) == set()
    graph.add_import(importer="sae_census.io.model.hooks", imported="sae_census.flows.effects.steer")
    assert "sae_census.flows.effects.steer" in what_steers(graph)


def test_observing_needs_neither_transformers_nor_what_steers():
    code = "import sys, sae_census.flows.notebook.observe; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sae_census.io.model.hooks" in loaded
    assert not [name for name in loaded if name.split(".")[-1] in ("transformers", "steer", "edits", "ray")]


# ---- what is refused


def test_no_prompts_give_no_rows(model, tokenizer, sae):
    assert encode_prompts(model, tokenizer, sae, [], LAYER).shape == (0, F)
    assert observe_prompts(model, tokenizer, sae, [], LAYER).shape == (0, F)


def test_a_prompt_without_tokens_is_named(model, tokenizer, sae, monkeypatch):
    assert encode_prompts(model, tokenizer, sae, [""], LAYER).shape == (1, F)  # this tokenizer adds a BOS

    class Bare:
        def __call__(self, text, **kwargs):
            return tokenizer(text, add_special_tokens=False, **kwargs)

    with pytest.raises(ValueError, match=r"^prompt 2 \(''\) has no tokens, so it has no last one$"):
        encode_prompts(model, Bare(), sae, ["a", "b", "", ""], LAYER)


def test_one_string_is_not_a_list_of_prompts(model, tokenizer, sae):
    with pytest.raises(ValueError, match=r"^prompts is one string; expected a sequence of them$"):
        encode_prompts(model, tokenizer, sae, "river", LAYER)


def test_an_sae_of_another_layer_width_or_kind_is_refused(model, tokenizer, sae):
    with pytest.raises(ConfigError, match=r"^layer_idx is 0, but the SAE SAE-Res-tiny-W1K-L0_45 belongs to blocks\.1"):
        encode_prompts(model, tokenizer, sae, PROMPTS, 0)
    narrow = replace(sae.sae, w_enc=sae.sae.w_enc[:8], w_dec=sae.sae.w_dec[:, :8], b_dec=sae.sae.b_dec[:8])
    with pytest.raises(ConfigError, match=r"^the SAE is 8 wide, but blocks\.1\.hook_resid_post of this model is 32"):
        encode_prompts(model, tokenizer, narrow, PROMPTS, LAYER)
    with pytest.raises(TypeError, match=r"^sae is a dict; expected what load_sae returns"):
        encode_prompts(model, tokenizer, {}, PROMPTS, LAYER)


def test_a_broken_activation_is_an_error_with_its_prompt(model, tokenizer, sae):
    broken = copy.deepcopy(model)
    ids = [set(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    (only_there, *_) = ids[3] - ids[0] - ids[1] - ids[4]
    with torch.no_grad():
        broken.model.embed_tokens.weight[only_there] = float("nan")
    with pytest.raises(ValueError, match=r"^activations of prompt 3 at blocks\.1\.hook_resid_post are NaN or inf"):
        encode_prompts(broken, tokenizer, sae, PROMPTS, LAYER)


# ---- the chat template


def test_the_chat_template_is_used_on_demand_and_recorded(model, tokenizer, sae, monkeypatch):
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = turns + "{% if add_generation_prompt %}bot:{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    raw = observe_prompts(model, tokenizer, sae, PROMPTS, LAYER)
    chat = observe_prompts(model, tokenizer, sae, PROMPTS, LAYER, apply_chat_template=True)
    assert (raw.apply_chat_template, chat.apply_chat_template) == (False, True)
    assert raw.last_token_ids.tolist() == [tokenizer(prompt)["input_ids"][-1] for prompt in PROMPTS]
    colon = tokenizer("bot:")["input_ids"][-1]
    assert chat.last_token_ids.tolist() == [colon] * len(PROMPTS)
    by_hand = [f"user: {prompt}\nbot:" for prompt in PROMPTS]
    without_bos = lambda text, **kwargs: tokenizer(text, add_special_tokens=False, **kwargs)  # noqa: E731
    torch.testing.assert_close(chat.dense(), encode_prompts(model, without_bos, sae, by_hand, LAYER), **AGREES)
    ranked = top_features_for_prompt(model, tokenizer, sae, PROMPTS[0], LAYER, apply_chat_template=True)
    assert ranked[0].feature_id == int(chat.dense()[0].argmax())


# ---- one prompt


def test_the_top_features_of_a_prompt_are_its_largest_codes(model, tokenizer, sae):
    codes = encode_prompts(model, tokenizer, sae, PROMPTS[:1], LAYER)[0].tolist()
    fired = sorted((feature for feature in range(F) if codes[feature]), key=lambda f: (-codes[f], f))
    assert len(fired) == K
    for top_n, expected in ((3, fired[:3]), (10, fired[:10]), (F, fired), (0, [])):
        ranked = top_features_for_prompt(model, tokenizer, sae, PROMPTS[0], LAYER, top_n)
        assert [one.feature_id for one in ranked] == expected
        assert [one.score for one in ranked] == pytest.approx([codes[f] for f in expected], abs=1e-5)
        assert all(one == FeatureRanking(one.feature_id, one.score) for one in ranked)
    assert len(top_features_for_prompt(model, tokenizer, sae, PROMPTS[0], LAYER)) == 10


def test_a_prompt_on_which_nothing_fires_has_no_top_features(model, tokenizer, sae_dirs):
    sae = load_sae(str(sae_dirs["late"])).sae
    silent = replace(sae, b_enc=torch.full_like(sae.b_enc, -1e6))
    assert top_features_for_prompt(model, tokenizer, silent, PROMPTS[0], LAYER) == []


def test_equal_codes_are_ranked_by_id():
    ints = np.arange(5, dtype=np.int32)
    codes = Codes(feature=ints, row=0 * ints, position=0 * ints, value=np.float32([1, 3, -2, 3, 1]))
    assert [one.feature_id for one in strongest_features(codes, 9)] == [1, 3, 0, 4, 2]
    with pytest.raises(ValueError, match=r"^top_n is -1; expected 0 or more$"):
        strongest_features(codes, -1)


# ---- two sets


def random_codes(num_prompts: int, seed: int, num_features: int = 12) -> Tensor:
    """Sparse signed codes; features 0 to 2 never fire and 5 and 6 are equal."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(num_prompts, num_features, generator=generator) * 10
    codes *= torch.rand(num_prompts, num_features, generator=generator) < 0.4
    codes[:, :3] = 0
    codes[:, 6] = codes[:, 5]
    return codes


def literal_differential(pos: Tensor, neg: Tensor) -> list[FeatureRanking]:
    p, n = pos.double().numpy(), neg.double().numpy()
    rows = []
    for f in range(p.shape[1]):
        difference = p[:, f].mean() - n[:, f].mean()
        pooled = ((len(p) - 1) * p[:, f].var(ddof=1) + (len(n) - 1) * n[:, f].var(ddof=1)) / (len(p) + len(n) - 2)
        effect = 0.0 if difference == 0 else difference / math.sqrt(pooled)
        rates = ((p[:, f] != 0).mean(), (n[:, f] != 0).mean())
        rows.append(FeatureRanking(f, difference, p[:, f].mean(), n[:, f].mean(), *rates, effect))
    return sorted(rows, key=lambda r: (-r.score, r.feature_id))


def assert_same_ranking(actual: list[FeatureRanking], expected: list[FeatureRanking]) -> None:
    assert [one.feature_id for one in actual] == [one.feature_id for one in expected]
    for name in ("score", "pos_mean", "neg_mean", "pos_fire_rate", "neg_fire_rate", "effect_size"):
        np.testing.assert_allclose(
            [getattr(one, name) for one in actual], [getattr(one, name) for one in expected], atol=1e-6, err_msg=name
        )


def test_differential_features_is_the_difference_of_means():
    pos, neg = random_codes(7, 0), random_codes(5, 1)
    expected = literal_differential(pos, neg)
    assert_same_ranking(differential_features(pos, neg, 99), expected)
    assert_same_ranking(differential_features(pos, neg), expected)
    assert_same_ranking(differential_features(pos, neg, top_n=4), expected[:4])
    by_id = {one.feature_id: position for position, one in enumerate(expected)}
    assert [by_id[f] for f in (1, 2, 6)] == [by_id[0] + 1, by_id[0] + 2, by_id[5] + 1]
    assert expected[0].score > 0 > expected[-1].score


def test_the_effect_size_ranks_on_demand():
    pos, neg = random_codes(7, 0), random_codes(5, 1)
    expected = sorted(literal_differential(pos, neg), key=lambda r: (-r.effect_size, r.feature_id))
    ranked = differential_features(pos, neg, by="effect_size")
    assert_same_ranking(ranked, [replace(one, score=one.effect_size) for one in expected])
    assert [one.feature_id for one in ranked] != [one.feature_id for one in differential_features(pos, neg)]


def test_sets_that_differ_in_nothing_but_their_means_are_infinitely_far_apart():
    pos, neg = torch.tensor([[3.7, 0.1, 1.3]] * 3), torch.tensor([[0.3, 0.1, 2.9]] * 4)
    assert [one.effect_size for one in differential_features(pos, neg)] == [math.inf, 0.0, -math.inf]


def test_equal_codes_have_no_spread_whatever_rounding_makes_of_them():
    pos = random_codes(1, 3, 500)[:, 3:].abs().add(0.1).expand(7, -1)
    assert {one.effect_size for one in differential_features(pos, pos[:3] * 0, top_n=500)} == {math.inf}


def test_two_prompts_have_no_effect_size():
    pair = random_codes(1, 0), random_codes(1, 1)
    assert {one.effect_size for one in differential_features(*pair)} == {None}
    with pytest.raises(ValueError, match=r"^an effect size needs at least three prompts in both sets together$"):
        differential_features(*pair, by="effect_size")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_sums_of_a_set_merge_in_any_order_to_the_bit(labels: list[str], rng: random.Random):
    codes = random_codes(len(labels), len(labels))
    parts = [SetSums.of(codes[[one == label for one in labels]]) for label in "abc"]
    rng.shuffle(parts)
    merged, whole = parts[0].merge(parts[1]).merge(parts[2]), SetSums.of(codes)
    assert merged.shape == whole.shape == codes.shape
    for name in ("fired", "total", "total_square"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_merged_sums_rank_as_the_dense_codes_do():
    pos, neg = random_codes(9, 0), random_codes(8, 1)
    merged = SetSums.of(pos[:2]).merge(SetSums.of(pos[2:]))
    assert_same_ranking(differential_features(merged, SetSums.of(neg)), literal_differential(pos, neg))
    assert differential_features(merged, neg) == differential_features(pos, neg)


def test_sparse_codes_are_dense_codes(model, tokenizer, sae):
    pos, neg = (observe_prompts(model, tokenizer, sae, part, LAYER) for part in (PROMPTS[:4], PROMPTS[4:]))
    assert differential_features(pos, neg) == differential_features(pos.dense(), neg.dense())
    for feature in range(F):
        assert torch.equal(scan_prompts_for_feature(pos, feature), scan_prompts_for_feature(pos.dense(), feature))
        assert fire_rate(pos, feature) == fire_rate(pos.dense(), feature)


def test_codes_of_two_dictionaries_are_not_compared():
    pos, neg = torch.zeros(2, 5), torch.zeros(3, 6)
    for pair in ((pos, neg), (SetSums.of(pos), neg), (pos, SetSums.of(neg))):
        with pytest.raises(ValueError, match=r"^feature dim mismatch: torch\.Size\(\[2, 5\]\) vs torch\.Size\(\[3, 6"):
            differential_features(*pair)
    with pytest.raises(ValueError, match=r"^feature dim mismatch"):
        SetSums.of(pos).merge(SetSums.of(neg))


def test_a_set_without_prompts_has_no_means():
    some, none = torch.ones(2, 5), torch.zeros(0, 5)
    for pair, name in (((none, some), "positive"), ((some, none), "negative"), ((some, SetSums.of(none)), "negative")):
        with pytest.raises(ValueError, match=rf"^the {name} set has no prompts, so it has no means; give at least one"):
            differential_features(*pair)


def test_nan_is_never_ranked():
    with pytest.raises(ValueError, match=r"^codes hold NaN or infinite values"):
        differential_features(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^a code of 1e\+12 is too large"):
        SetSums.of(torch.full((1, 2), 1e12))


# ---- one feature


def test_scan_and_fire_rate_look_at_one_column():
    codes = torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.0, 0.0]])
    assert scan_prompts_for_feature(codes, 1).tolist() == [2, -1, 0]
    assert (fire_rate(codes, 0), fire_rate(codes, 1)) == (0, pytest.approx(2 / 3))
    assert isinstance(fire_rate(codes, 1), float)
    with pytest.raises(ValueError, match=r"^there are no prompts"):
        fire_rate(torch.zeros(0, 2), 1)


@pytest.mark.parametrize("feature_id", [-1, 2, 10**9])
def test_a_feature_that_is_not_there_is_an_index_error(feature_id):
    for ask in (scan_prompts_for_feature, fire_rate):
        with pytest.raises(IndexError, match=rf"^feature_id is {feature_id}, but the codes have features 0 to 1$"):
            ask(torch.ones(3, 2), feature_id)


# ---- print


def test_a_ranking_prints_one_line_for_each_entry():
    two_sets = FeatureRanking(7, 1.5, 0.0, -1.5, 0.25, 1.0, 3.0)
    line = (
        r"feat\s+7\s+diff=\s*\+1\.5000\s+pos_mean=\s*\+0\.0000\s+neg_mean=\s*-1\.5000\s+pos_fire=0\.25\s+neg_fire=1\.00"
    )
    assert re.fullmatch(line, pretty_ranking([two_sets]).strip())
    lines = pretty_ranking([FeatureRanking(123456, -2.0), two_sets]).split("\n")
    assert re.fullmatch(r"feat\s+123456\s+act=\s*-2\.0000", lines[0].strip())
    assert re.fullmatch(line, lines[1].strip())
    assert pretty_ranking([]) == ""


def test_an_effect_size_is_printed_under_its_own_name():
    pos, neg = torch.tensor([[1.0, 4.0], [3.0, 4.5]]), torch.tensor([[0.5, 1.0], [1.5, 0.0]])
    for one in differential_features(pos, neg, by="effect_size"):
        said = dict(part.split("=") for part in re.sub(r"=\s+", "=", pretty_ranking([one])).split() if "=" in part)
        assert float(said["diff"]) == pytest.approx(one.pos_mean - one.neg_mean, abs=1e-4)
        assert float(said["effect_size"]) == pytest.approx(one.effect_size, abs=1e-4)
        assert said["diff"] != said["effect_size"]
    assert "effect_size" not in pretty_ranking(differential_features(pos, neg))


# ---- the whole


def test_the_flow_of_the_document_runs_on_a_checkpoint_of_its_format(model, tokenizer, sae):
    from sae_census import (
        differential_features,
        encode_prompts,
        fire_rate,
        pretty_ranking,
        scan_prompts_for_feature,
        top_features_for_prompt,
    )

    pos = encode_prompts(model, tokenizer, sae, ["def return value", "list for index", "print None def"], LAYER)
    neg = encode_prompts(model, tokenizer, sae, ["mother bread", "kitchen sugar evening"], LAYER)
    ranking = differential_features(pos, neg, top_n=20)
    assert len(pretty_ranking(ranking).splitlines()) == len(ranking) == 20
    best = ranking[0]
    assert scan_prompts_for_feature(pos, best.feature_id).mean().item() == pytest.approx(best.pos_mean, abs=1e-6)
    assert (fire_rate(pos, best.feature_id), fire_rate(neg, best.feature_id)) == (
        best.pos_fire_rate,
        best.neg_fire_rate,
    )
    assert "act=" in pretty_ranking(top_features_for_prompt(model, tokenizer, sae, "def return", LAYER, top_n=5))


def test_every_name_can_be_imported_from_the_package():
    for name in observe.__all__:
        assert getattr(sae_census, name) is getattr(observe, name)
        assert name in sae_census.__all__
