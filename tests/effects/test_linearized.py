"""The notebook's calls on its own setting: a one-layer model with LayerNorm and GELU, an SAE on its MLP."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from test_trace import close, exact
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from sae_census import (
    LanguageModel,
    analyze_linearized_feature,
    load_sae,
    make_token_df,
    save_linearized,
    trace_feature,
)
from sae_census.compute.effects import tangent
from sae_census.compute.numbers.sae import Relu, SparseAutoencoder
from sae_census.errors import CheckpointError, ConfigError
from sae_census.flows.effects.linearized import READ_OUTS
from sae_census.flows.effects.token_tables import linearized_tables
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.model.paths import Paths
from sae_census.io.store import tables
from sae_census.types import HookPoint

WIDTH, MLP, HEADS, VOCABULARY, T = 24, 40, 3, 300, 12
FEATURE, SAMPLE, TOKEN, BATCH = 7, 2, 5, 4
CPU = torch.device("cpu")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> LanguageModel:
    folder = tmp_path_factory.mktemp("gelu-1l")
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_inner=MLP, n_layer=1, n_head=HEADS,
        activation_function="gelu", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inner = GPT2LMHeadModel(config)
        for weight in inner.parameters():
            nn.init.normal_(weight, std=0.3)
    inner.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(model_dir / name, folder)
    return LanguageModel(str(folder), dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LoadedSae:
    return load_sae(str(write_neel(tmp_path_factory.mktemp("sae"))))


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randint(3, VOCABULARY, (6, T), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def result(model: LanguageModel, data: Tensor, encoder: LoadedSae) -> dict[str, Any]:
    return analyze_linearized_feature(
        feature_idx=FEATURE,
        sample_idx=SAMPLE,
        token_idx=TOKEN,
        model=model,
        data=data,
        encoder=encoder,
        batch_size=BATCH,
    )


def write_neel(folder: Path, version: str = "25", seed: int = 3, **changes: Any) -> Path:
    """A checkpoint in the notebook's layout, with the config that the notebook prints."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(MLP, 16, generator=generator),
        "W_dec": torch.randn(16, MLP, generator=generator),
        "b_enc": torch.randn(16, generator=generator),
        "b_dec": 0.1 * torch.randn(MLP, generator=generator),
    }
    torch.save(
        {k: v for k, v in (tensors | changes.pop("tensors", {})).items() if v is not None}, folder / f"{version}.pt"
    )
    config = {"batch_size": 4096, "d_mlp": MLP, "dict_mult": 8, "enc_dtype": "fp32", "l1_coeff": 3e-4, "seed": 52}
    (folder / f"{version}_cfg.json").write_text(json.dumps(config | changes))
    return folder


# --- the notebook's cells ---


def test_the_cells_of_the_notebook_run(model, data, encoder, result):
    batch = data[:BATCH]
    token_df = make_token_df(batch, model=model)
    token_df["feature"] = result["sae activations"][:, FEATURE].detach().cpu().numpy()
    top = token_df.sort_values("feature", ascending=False).head(20)
    assert list(top.columns) == ["str_tokens", "unique_token", "context", "batch", "pos", "label", "feature"]
    token_df["feature"] = result["activation scores"].numpy()
    assert len(token_df.sort_values("feature", ascending=False).head(20)) == 20
    frame = pd.DataFrame(
        dict(str_tokens=result["token strings"], feature_scores=result["token scores"].detach().cpu().numpy())
    )
    assert frame.shape == (10, 2)
    assert frame["feature_scores"].is_monotonic_decreasing


def test_codes_are_those_of_the_sae_on_the_hidden_layer_of_the_mlp(model, data, encoder, result):
    hidden = []
    mlp = model.inner.transformer.h[0].mlp
    handle = mlp.c_proj.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    model.inner(input_ids=data[:BATCH])
    handle.remove()
    sae = encoder.sae
    dense = torch.relu((hidden[0].flatten(0, 1) - sae.b_dec) @ sae.w_enc + sae.b_enc)
    codes = result["sae activations"]
    assert codes.shape == (BATCH * T, 16)
    for feature in (0, FEATURE, -1):
        torch.testing.assert_close(codes[:, feature], dense[:, feature], rtol=1e-4, atol=1e-4)
    assert codes[T : 2 * T, FEATURE].shape == (T,)
    assert float(codes[T + 3, FEATURE]) == float(codes[:, FEATURE][T + 3])
    with pytest.raises(IndexError):
        codes[:, 16]
    expected = (hidden[0].flatten(0, 1) - sae.b_dec) @ sae.w_enc[:, FEATURE] + sae.b_enc[FEATURE]
    torch.testing.assert_close(result["pre-activations"].float(), expected, rtol=1e-4, atol=1e-4)


def resid_mid(model: LanguageModel, data: Tensor) -> Tensor:
    got = []
    handle = model.inner.transformer.h[0].ln_2.register_forward_pre_hook(lambda _m, args: got.append(args[0]))
    model.inner(input_ids=data)
    handle.remove()
    return got[0]


def test_activation_scores_are_the_stream_times_the_gradient(model, data, result):
    expected = resid_mid(model, data[:BATCH]).flatten(0, 1) @ result["mid"]
    torch.testing.assert_close(result["activation scores"].float(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_equals_central_differences(model, data, encoder, result):
    """Of M(x) · w in float64, M written out: LayerNorm, GELU, no code under test."""
    block = model.inner.transformer.h[0]
    weights = {name: value.double() for name, value in block.named_parameters()}
    w = encoder.sae.w_enc[:, FEATURE].double()

    def function(x: Tensor) -> float:
        centred = x - x.mean()
        normed = centred / (centred.square().mean() + block.ln_2.eps).sqrt()
        u = (normed * weights["ln_2.weight"] + weights["ln_2.bias"]) @ weights["mlp.c_fc.weight"]
        u = u + weights["mlp.c_fc.bias"]
        return float((0.5 * u * (1 + torch.erf(u / 2**0.5))) @ w)

    at = resid_mid(model, data)[SAMPLE, TOKEN].double()
    steps = 1e-5 * torch.eye(WIDTH).double()
    expected = torch.tensor([(function(at + e) - function(at - e)) / 2e-5 for e in steps])
    torch.testing.assert_close(result["mid"], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_gradient_behind_a_layer_norm_ignores_the_mean_and_the_length_of_the_stream(model, data, result):
    mid, at = result["mid"].double(), resid_mid(model, data)[SAMPLE, TOKEN].double()
    assert abs(float(mid.sum())) < 1e-4 * float(mid.abs().sum())
    assert abs(float(mid @ at)) < 1e-3 * float(mid.norm() * at.norm())


def test_the_tangent_touches_at_the_point_and_orders_tokens_as_the_scores_do(data, model, encoder, result):
    here = analyze_linearized_feature(FEATURE, 1, TOKEN, model, data, encoder, 2)
    place = T + TOKEN
    close(float(here["tangent estimates"][place]), float(here["pre-activations"][place]), 1.0)
    close(here["pre-activation"], float(here["pre-activations"][place]), 1.0)
    assert torch.equal(
        result["tangent estimates"].argsort(stable=True), result["activation scores"].argsort(stable=True)
    )


def test_the_tangent_of_a_linear_function_is_exact_everywhere():
    w, x = torch.randn(8).double(), torch.randn(5, 8).double()
    value, slope = tangent.slope(lambda rows: rows @ w + 3.0, x[0])
    torch.testing.assert_close(x @ slope + (value - float(x[0] @ slope)), x @ w + 3.0)


def test_quality_is_spearmans_correlation_and_agreement_in_sign(result):
    estimate, truth = result["tangent estimates"].numpy(), result["pre-activations"].numpy()
    close(result["quality"].rank_correlation, spearmanr(estimate, truth).statistic, 1.0, 1e-9)
    assert result["quality"].sign_agreement == np.mean(np.sign(estimate) == np.sign(truth))
    ties = np.array([1.0, 1.0, 2.0, 0.0]), np.array([3.0, 1.0, 3.0, -1.0])
    close(tangent.quality(*ties).rank_correlation, spearmanr(*ties).statistic, 1.0, 1e-12)
    assert np.isnan(tangent.quality(np.ones(3), np.arange(3.0)).rank_correlation)


def test_vocabulary_scores_are_embeddings_times_the_gradient(model, result):
    expected = model.inner.transformer.wte.weight @ result["mid"]
    torch.testing.assert_close(result["tokens"], expected, rtol=1e-4, atol=1e-5)
    best = sorted(range(VOCABULARY), key=lambda i: (-float(result["tokens"][i]), i))[:10]
    assert result["token strings"] == model.tokenizer.tokens(best)
    assert result["token scores"].tolist() == [float(result["tokens"][i]) for i in best]


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_embeddings_are_as_large_as_the_family_makes_them(scale, model_dir):
    inner = LlamaForCausalLM.from_pretrained(model_dir).eval().requires_grad_(False)
    inner.model.embed_tokens.register_forward_hook(lambda _m, _a, out: out * 1.0)
    inner.model.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: ((args[0] * scale, *args[1:]), kwargs), with_kwargs=True
    )
    torch.testing.assert_close(Paths(inner).embedding_rows(), inner.model.embed_tokens.weight * scale)


def test_a_point_outside_the_batch_is_linearised_in_its_own_context(model, data, encoder):
    far = analyze_linearized_feature(FEATURE, 5, TOKEN, model, data, encoder, 2)
    moved = analyze_linearized_feature(FEATURE, 0, TOKEN, model, data.flip(0), encoder, 6)
    torch.testing.assert_close(far["mid"], moved["mid"])
    assert len(far["activation scores"]) == 2 * T


# --- attention, which the notebook leaves open ---


def test_heads_direct_path_and_bias_add_up_to_the_score_of_every_query(model, data, result):
    parts = result["head contributions"].sum(dim=(0, 2)) + result["direct path"] + result["attention bias"]
    assert result["attention layer"] == 0
    assert result["head contributions"].shape == (HEADS, T, T)
    expected = resid_mid(model, data)[SAMPLE].double() @ result["mid"].double()
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-4)
    first = model.inner.transformer.wte(data[SAMPLE]) + model.inner.transformer.wpe(torch.arange(T))
    torch.testing.assert_close(result["direct path"].float(), first @ result["mid"], rtol=1e-4, atol=1e-4)


def test_read_outs_are_the_circuits_written_out(model, data, result):
    block = model.inner.transformer.h[0]
    w_q, w_k, w_v = block.attn.c_attn.weight.split(WIDTH, dim=1)
    size, embedding = WIDTH // HEADS, model.inner.transformer.wte.weight
    for head in range(HEADS):
        columns = slice(head * size, (head + 1) * size)
        w_ov = w_v[:, columns] @ block.attn.c_proj.weight[columns]
        w_qk = w_q[:, columns] @ w_k[:, columns].T
        expected = {
            "OV": embedding @ w_ov @ result["mid"],
            "ln+OV": block.ln_1(embedding) @ w_ov @ result["mid"],
            "QK": embedding @ w_qk @ result["mid"],
        }
        for name, scores in expected.items():
            found = result[f"{name} unembed"][head]
            torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)
            best = tangent.strongest(found, 10).tolist()
            assert result[f"{name} token strings"][head] == model.tokenizer.tokens(best)
            assert result[f"{name} token scores"][head].tolist() == found[best].tolist()


def test_what_a_head_brings_from_a_token_of_the_first_block_is_its_read_out_times_the_pattern(model, data, encoder):
    """Without positional embeddings the read-out of normed embeddings, times attention, is the contribution."""
    inner = model.inner
    kept = inner.transformer.wpe.weight.clone()
    try:
        inner.transformer.wpe.weight.zero_()
        found = analyze_linearized_feature(FEATURE, 0, TOKEN, model, data, encoder, 1)
        inner.set_attn_implementation("eager")
        pattern = inner(input_ids=data[:1], output_attentions=True).attentions[0][0]
    finally:
        inner.set_attn_implementation("sdpa")
        inner.transformer.wpe.weight.copy_(kept)
    expected = pattern * found["ln+OV unembed"][:, data[0]][:, None]
    torch.testing.assert_close(found["head contributions"].float(), expected, rtol=1e-4, atol=1e-5)


# --- tables ---


def test_contexts_of_tokens_hold_five_before_and_one_after_up_to_the_very_last(model, data):
    frame = make_token_df(data, model)
    words = [text.replace(" ", "·").replace("\n", "↩\n") for text in model.tokenizer.tokens(data[1].tolist())]
    for position in range(T):
        row = frame.iloc[T + position]
        after = words[position + 1] if position + 1 < T else ""
        assert row["context"] == f"{''.join(words[max(0, position - 5) : position])}|{words[position]}|{after}"
        assert (row["batch"], row["pos"]) == (1, position)
        assert row["label"] == f"1/{position}"
        assert row["unique_token"] == f"{words[position]}/{position}"
    wide = make_token_df(data, model, len_prefix=1, len_suffix=3).iloc[4]["context"]
    first = make_token_df(data[:1], model)["str_tokens"].tolist()
    assert wide == f"{first[3]}|{first[4]}|{''.join(first[5:8])}"


def test_tables_are_the_best_of_the_batch_and_are_saved_with_a_page(model, data, result, tmp_path):
    folder = save_linearized(result, data[:BATCH], model, tmp_path / "out", head=6)
    frame = make_token_df(data[:BATCH], model)
    for name, values in (
        ("activations", result["sae activations"][:, FEATURE]),
        ("scores", result["activation scores"]),
    ):
        table = tables.read(folder / f"{name}.parquet")
        best = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:6]
        assert table["feature"].to_pylist() == [float(values[i]) for i in best]
        assert table["label"].to_pylist() == [frame["label"][i] for i in best]
    heads = tables.read(folder / "heads.parquet").to_pylist()
    assert [(row["read_out"], row["head"], row["rank"]) for row in heads] == [
        (name, head, rank) for name in READ_OUTS for head in range(HEADS) for rank in range(10)
    ]
    assert tables.read(folder / "input_tokens.parquet")["str_tokens"].to_pylist() == result["token strings"]
    body = (folder / "linearized.html").read_text()
    assert "rank correlation" in body
    assert body.count("<table>") == 4


# --- other families and sites ---


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("stream", ["mlp_in", "mlp_post", "mlp_out", "resid_pre", "resid_post"])
def test_other_families_and_streams_are_linearised_too(name, stream, model):
    paths, point = exact(name), HookPoint(1, stream)
    ids = torch.arange(14).view(2, 7) % 11 + 3
    other = LanguageModel.__new__(LanguageModel)
    inner = paths._inner
    other.__dict__.update(model.__dict__ | {"inner": inner, "_taps": paths._taps, "_blocks": paths._modules})
    width = paths.read(ids[0], [point], [0]).streams[point].shape[1]
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(
        w_enc=torch.randn(width, 5, generator=generator), b_enc=torch.randn(5, generator=generator),
        w_dec=torch.randn(5, width, generator=generator), b_dec=torch.zeros(width), gate=Relu(), transform="layer_norm",
    )  # fmt: skip
    loaded = LoadedSae(name="x", hook_point=point, sae=sae, digest="", metadata={})
    found = analyze_linearized_feature(2, 1, 4, other, ids, loaded, 2)
    place = 7 + 4
    close(float(found["tangent estimates"][place]), float(found["pre-activations"][place]), 1.0)
    base = paths.base_of(point)
    stream_at = paths.read(ids[1], [point], range(7)).streams[base]
    scores = stream_at.double() @ found["mid"].double()
    torch.testing.assert_close(found["activation scores"][7:], scores, rtol=1e-4, atol=1e-4)
    parts = found["head contributions"].sum(dim=(0, 2)) + found["direct path"] + found["attention bias"]
    torch.testing.assert_close(parts, scores, rtol=1e-4, atol=1e-4)
    double = replace(sae, w_enc=sae.w_enc.double(), b_enc=sae.b_enc.double())
    tail, at = paths.tail(point), stream_at[4]
    steps = 1e-5 * torch.eye(len(at)).double()

    def function(x: Tensor) -> float:
        return float(double.pre_activations(tail(x[None]), 2))

    expected = torch.tensor([(function(at + e) - function(at - e)) / 2e-5 for e in steps], dtype=torch.float64)
    torch.testing.assert_close(found["mid"], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "feature": ({"feature_idx": 16}, "feature_idx is 16; expected 0 to 15"),
    "sample": ({"sample_idx": 6}, "sample_idx is 6; expected 0 to 5"),
    "token": ({"token_idx": -1}, "token_idx is -1; expected 0 to 11"),
    "batch": ({"batch_size": 7}, "batch_size - 1 is 6; expected 0 to 5"),
    "data": (
        {"data": torch.zeros(3, dtype=torch.long)},
        r"data has shape (3,); expected token ids, (contexts, tokens)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_indices_out_of_range_are_refused(name, model, data, encoder):
    arguments = {"feature_idx": 0, "sample_idx": 0, "token_idx": 0, "model": model, "data": data, "encoder": encoder}
    changes, message = REFUSED[name]
    with pytest.raises(ConfigError) as refusal:
        analyze_linearized_feature(**arguments | {"batch_size": 1} | changes)
    assert str(refusal.value) == message


def test_half_precision_and_saes_inside_attention_are_refused(model, data, encoder):
    inside = replace(encoder, hook_point=HookPoint(0, "attn_z"))
    with pytest.raises(ConfigError, match="is inside attention, which mixes tokens; use trace_feature instead"):
        analyze_linearized_feature(0, 0, 0, model, data, inside, 1)
    half = LanguageModel(model._origin[0], dtype=torch.bfloat16, device=CPU)
    with pytest.raises(ConfigError, match=r"needs a model in float32, this one computes in torch\.bfloat16"):
        analyze_linearized_feature(0, 0, 0, half, data, encoder, 1)


def test_the_same_sae_is_traced_to_the_same_pre_activation(model, data, encoder, result):
    one = trace_feature(FEATURE, TOKEN, model, data[SAMPLE], encoder)
    close(one.pre_activation, result["pre-activation"], 1.0)
    close(one.total, one.pre_activation, 1.0)
    assert one.intercept != 0


# --- the checkpoint layout ---


def test_several_versions_lie_in_a_folder_and_one_is_named(tmp_path):
    write_neel(tmp_path, "25")
    write_neel(tmp_path, "47", seed=4)
    first, second = (load_sae(str(tmp_path / f"{version}.pt")) for version in ("25", "47"))
    assert str(first.hook_point) == "blocks.0.mlp.hook_post"
    assert first.digest != second.digest
    with pytest.raises(
        CheckpointError, match=r"has several files \(25\.pt, 25_cfg\.json, 47\.pt.*give the path of \*\.pt$"
    ):
        load_sae(str(tmp_path))


def test_a_later_config_names_its_hook_point(tmp_path):
    folder = write_neel(tmp_path, d_mlp=None, act_name="blocks.2.attn.hook_z", act_size=MLP, dict_size=16)
    assert load_sae(str(folder)).hook_point == HookPoint(2, "attn_z")


def test_weights_of_half_precision_are_read_as_float32(tmp_path):
    folder = write_neel(tmp_path, tensors={"b_enc": torch.ones(16).half()}, enc_dtype="fp16")
    assert load_sae(str(folder)).sae.b_enc.dtype == torch.float32


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (eval, ("1 + 1",))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no W_dec": (
        lambda f: write_neel(f, tensors={"W_dec": None}),
        r"has no tensor 'W_dec'; it has W_enc, b_dec, b_enc$",
    ),
    "across": (lambda f: write_neel(f, tensors={"W_enc": torch.ones(16, MLP)}), r"do not fit; expected \(D, F\)"),
    "a vector": (lambda f: write_neel(f, tensors={"W_enc": torch.ones(16)}), r"W_enc \(16,\).* do not fit"),
    "other width": (lambda f: write_neel(f, d_mlp=41), r"is of activations 41 wide, but W_enc takes 40$"),
    "cut": (lambda f: cut(write_neel(f) / "25.pt"), r"not a sound torch file"),
    "code": (
        lambda f: torch.save({"x": Payload()}, write_neel(f) / "25.pt"),
        r"pickles that hold code or objects are never loaded",
    ),
    "NaN": (lambda f: write_neel(f, tensors={"b_dec": torch.full((MLP,), torch.nan)}), r"has NaN or infinite values"),
    "config": (lambda f: (write_neel(f) / "25_cfg.json").write_text("[1]"), r"25_cfg\.json holds no JSON object$"),
    "not JSON": (lambda f: (write_neel(f) / "25_cfg.json").write_text("{"), r"is not JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused(name, tmp_path):
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(tmp_path))


def test_a_version_without_its_config_is_refused(tmp_path):
    write_neel(tmp_path, "25")
    write_neel(tmp_path, "26")
    (tmp_path / "26_cfg.json").unlink()
    with pytest.raises(CheckpointError, match=r"26\.pt has no config beside it; expected 26_cfg\.json$"):
        load_sae(str(tmp_path / "26.pt"))


def test_tables_without_attention_have_no_heads(model, data, encoder):
    at_the_start = replace(encoder, hook_point=HookPoint(0, "resid_pre"), sae=_of_width(WIDTH))
    found = analyze_linearized_feature(1, 0, 3, model, data, at_the_start, 2)
    assert found["attention layer"] is None
    assert set(linearized_tables(found, data[:2], model)) == {"activations", "scores", "input_tokens"}


def _of_width(width: int) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(8)
    w = torch.randn(width, 4, generator=generator)
    return SparseAutoencoder(w_enc=w, b_enc=torch.zeros(4), w_dec=w.T, b_dec=torch.zeros(width), gate=Relu())
