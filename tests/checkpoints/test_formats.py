"""Checkpoint formats: each is written small and compared with its formula in its own layout; the rest is refused."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    LINEAR,
    LOWER,
    NAMES,
    NEW,
    NORM,
    POINT,
    SIZES,
    SPARSIFY,
    Config,
    K,
    Tensors,
    corrupt,
    dictionary,
    dictionary_of,
    dictionary_tensors,
    gemma_scope,
    gemma_scope_2,
    linear,
    llama_of,
    llama_scope,
    llamascopium,
    llamascopium_of,
    normal,
    qwen_scope,
    sparsify,
)

from sae_census.compute.effects.edits import Edit, edit
from sae_census.compute.numbers.sae import TopK
from sae_census.errors import CheckpointError
from sae_census.io.checkpoints import LoadedSae, load_sae

B, T = 3, 5
Arrays = dict[str, np.ndarray]


def top(pre: np.ndarray, k: int) -> np.ndarray:
    best = np.argsort(-pre, axis=-1, kind="stable")[..., :k]
    mask = np.zeros_like(pre)
    np.put_along_axis(mask, best, 1, axis=-1)
    return pre * mask


def relu(pre: np.ndarray) -> np.ndarray:
    return np.maximum(pre, 0)


def exact(tensors: Tensors) -> Arrays:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def assert_computes(loaded: LoadedSae, d: int, formula: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """The SAE's signed codes and reconstruction are the formula's, which is neither silent nor dense.

    So are what an activation becomes without its error, and the codes that a factor scales.
    """
    x = 2 * normal(B, T, d, seed=9) + 0.3
    expected, reconstruction = formula(x.double().numpy())
    assert 0.02 < (expected != 0).mean() < 0.9
    codes = loaded.sae.encode(x, signed=True)
    ours = np.zeros(expected.shape)
    ours[codes.row, codes.position, codes.feature] = codes.value
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loaded.sae.reconstruct(x, codes), reconstruction, rtol=1e-4, atol=1e-4)
    feature = int(np.argmin(expected.min(axis=(0, 1))))  # the most negative code, if there is any
    dropped = edit(loaded.sae, x.flatten(0, 1), [Edit(feature=feature, value=1.0)], error_term="drop").x
    np.testing.assert_allclose(dropped.view(x.shape), reconstruction, rtol=1e-4, atol=1e-4)
    scaled = edit(loaded.sae, x.flatten(0, 1), [Edit(feature=feature, value=3.0)])
    assert scaled.touched.tolist() == (expected[..., feature] != 0).flatten().tolist()
    if loaded.sae.transform == "none":
        step = 2 * expected[..., feature, None] * loaded.sae.w_dec[feature].double().numpy()
        np.testing.assert_allclose(scaled.x.view(x.shape) - x, step, rtol=1e-4, atol=1e-4)


# ---- Qwen-Scope


@pytest.mark.parametrize(("d", "f"), SIZES)
def test_qwen_scope(d, f, tmp_path):
    loaded = load_sae(str(qwen_scope(tmp_path, d, f) / "layer12.sae.pt"))
    w = exact(linear(d, f, **NAMES, flipped=True))

    def formula(x):
        z = top(x @ w["W_enc"].T + w["b_enc"], K)  # no ReLU, nothing subtracted
        assert (z < 0).any() == (f == 16)
        return z, z @ w["W_dec"].T + w["b_dec"] + 12

    assert_computes(loaded, d, formula)
    assert (loaded.name, str(loaded.hook_point)) == (f"SAE-Res-Qwen-W1K-L0_{K}", "blocks.12.hook_resid_post")
    assert loaded.sae.gate == TopK(K, "identity")
    codes = loaded.sae.encode(normal(B, T, d) - 5)
    assert (codes.value > 0).all()


# ---- sparsify


@pytest.mark.parametrize(("d", "f"), SIZES)
def test_sparsify(d, f, tmp_path):
    loaded = load_sae(str(sparsify(tmp_path, d=d, f=f, activation="topk", multi_topk=True, normalize_decoder=True)))
    w = exact(linear(d, f, **SPARSIFY, flipped=False))

    def formula(x):
        pre = relu((x - w["b_dec"]) @ w["encoder.weight"] + w["encoder.bias"])
        z = top(pre, 4)
        return z, z @ w["W_dec"] + w["b_dec"]

    assert_computes(loaded, d, formula)
    assert (loaded.name, str(loaded.hook_point)) == ("layers.10", "blocks.10.hook_resid_post")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("h.5", "blocks.5.hook_resid_post"),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("layers.3.attention", "blocks.3.hook_attn_out"),
        ("h.3.attn", "blocks.3.hook_attn_out"),
        ("layers.3.self_attn", "blocks.3.hook_attn_out"),
        ("embed_tokens", "blocks.0.hook_resid_pre"),
        ("layers.3/seed7", "blocks.3.hook_resid_post"),
    ],
)
def test_the_folder_of_sparsify_is_the_module(module, expected, tmp_path):
    (tmp_path / "config.json").write_text('{"model": "EleutherAI/pythia-70m", "ctx_len": 2048}')
    loaded = load_sae(str(sparsify(tmp_path, module)))
    assert str(loaded.hook_point) == expected
    assert (loaded.metadata["model_name"], loaded.metadata["context_size"]) == ("EleutherAI/pythia-70m", 2048)


def test_a_module_without_a_hook_point_needs_the_users_word(tmp_path):
    folder = sparsify(tmp_path, "layers.3.mlp.gate")
    with pytest.raises(CheckpointError, match="does not say where it belongs"):
        load_sae(str(folder))
    assert load_sae(str(folder), hook_point="blocks.3.mlp.hook_post").hook_point.stream == "mlp_post"


@pytest.mark.parametrize("module", ["layers.3.mlp", "layers.3.self_attn", "embed_tokens"])
def test_gemma_norms_what_these_modules_give_so_they_are_no_hook_points(module, tmp_path):
    (tmp_path / "config.json").write_text('{"model": "google/gemma-2-2b"}')
    with pytest.raises(CheckpointError, match=rf"reads {re.escape(module)} of google/gemma-2-2b, which Gemma norms"):
        load_sae(str(sparsify(tmp_path, module)))
    assert load_sae(str(sparsify(tmp_path, "layers.4"))).hook_point.layer == 4


# ---- dictionary_learning


def dictionary_formula(kind: str, w: Arrays) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def formula(x):
        match kind:
            case "AutoEncoder":
                lengths = np.linalg.norm(w["decoder.weight"], axis=0)
                z = relu((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"])
                return z * lengths, z @ w["decoder.weight"].T + w["bias"]
            case "AutoEncoderNew":
                z = relu(x @ w["encoder.weight"].T + w["encoder.bias"])
                return z, z @ w["decoder.weight"].T + w["decoder.bias"]
            case "GatedAutoEncoder":
                e = (x - w["decoder_bias"]) @ w["encoder.weight"].T
                z = (e + w["gate_bias"] > 0) * relu(np.exp(w["r_mag"]) * e + w["mag_bias"])
                return z, z @ w["decoder.weight"].T + w["decoder_bias"]
            case "JumpReluAutoEncoder":
                pre = x @ w["W_enc"] + w["b_enc"]
                z = relu(pre * (pre > w["threshold"]))
                return z, z @ w["W_dec"] + w["b_dec"]
            case "AutoEncoderTopK":
                z = top(relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]), 5)
                return z, z @ w["decoder.weight"].T + w["b_dec"]
            case "BatchTopKSAE":
                pre = relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
                z = pre * (pre > w["threshold"])
                return z, z @ w["decoder.weight"].T + w["b_dec"]
        pre = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        z = pre * (pre > w["threshold"])
        return z, z @ w["W_dec"] + w["b_dec"]

    return formula


DICTIONARIES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


@pytest.mark.parametrize(("d", "f"), SIZES)
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning(kind, d, f, tmp_path):
    tensors = dictionary_tensors(kind, d, f)
    trainer = {
        "dict_class": kind,
        "submodule_name": "resid_post_layer_8",
        "lm_name": "EleutherAI/pythia-70m",
        "layer": 8,
    }
    loaded = load_sae(str(dictionary(tmp_path, tensors, trainer, {"io": "out", "ctx_len": 128})))
    assert_computes(loaded, d, dictionary_formula(kind, exact(tensors)))
    assert str(loaded.hook_point) == "blocks.8.hook_resid_post"
    assert loaded.metadata["context_size"] == 128


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"]
)
def test_a_dictionary_without_a_class_is_told_by_its_tensors(kind, tmp_path):
    tensors = dictionary_tensors(kind, 7, 24)
    loaded = load_sae(str(dictionary(tmp_path, tensors, {})), hook_point="blocks.1.hook_resid_post")
    assert_computes(loaded, 7, dictionary_formula(kind, exact(tensors)))


def test_a_dictionarys_k_may_stand_in_its_config_alone(tmp_path):
    tensors = dictionary_tensors("AutoEncoderTopK", 7, 24)
    del tensors["k"], tensors["threshold"]
    trainer = {"dict_class": "AutoEncoderTopK", "k": 5, "submodule_name": "resid_post_layer_8"}
    loaded = load_sae(str(dictionary(tmp_path, tensors, trainer)))
    assert_computes(loaded, 7, dictionary_formula("AutoEncoderTopK", exact(tensors)))


def test_the_input_of_a_block_is_resid_pre(tmp_path):
    trainer = {"dict_class": "AutoEncoder", "submodule_name": "resid_post_layer_8"}
    folder = dictionary(tmp_path, dictionary_tensors("AutoEncoder", 7, 24), trainer, {"io": "in"})
    assert str(load_sae(str(folder)).hook_point) == "blocks.8.hook_resid_pre"


def test_a_decoder_row_of_zeros_stays_one(tmp_path):
    tensors = dictionary_tensors("AutoEncoder", 7, 24)
    tensors["decoder.weight"][:, 3] = 0
    trainer = {"dict_class": "AutoEncoder", "submodule_name": "resid_post_layer_8"}
    assert load_sae(str(dictionary(tmp_path, tensors, trainer))).sae.w_dec[3].tolist() == [0] * 7


# ---- Gemma Scope


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize(("d", "f"), SIZES)
def test_gemma_scope(d, f, lower, tmp_path):
    inner = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    loaded = load_sae(str(gemma_scope(tmp_path, inner, d, f, lower=lower)))
    w = exact(linear(d, f, **NAMES, flipped=False) | {"threshold": normal(f, seed=5).abs() + 0.5})

    def formula(x):
        pre = x @ w["W_enc"] + w["b_enc"]
        z = relu(pre) * (pre > w["threshold"])
        return z, z @ w["W_dec"] + w["b_dec"]

    assert_computes(loaded, d, formula)
    assert (loaded.name, str(loaded.hook_point)) == ("average_l0_71", "blocks.20.hook_resid_post")
    assert loaded.metadata["model_name"] == "gemma-2-2b"


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("models--google--gemma-scope-9b-it-res/snapshots/abc", "blocks.4.hook_resid_post"),
        ("gemma-scope-2b-pt-mlp", "blocks.4.hook_mlp_out"),
        ("gemma-scope-27b-pt-att", "blocks.4.attn.hook_z"),
        ("copies", None),
    ],
)
def test_the_site_of_gemma_scope_stands_in_the_path(repository, expected, tmp_path):
    folder = gemma_scope(tmp_path, f"{repository}/layer_4/width_16k/average_l0_71")
    if expected is None:
        with pytest.raises(CheckpointError, match="does not say where it belongs"):
            load_sae(str(folder))
    else:
        assert str(load_sae(str(folder)).hook_point) == expected


OUTPUT = {"hf_hook_point_in": "model.layers.12.output", "hf_hook_point_out": "model.layers.12.output"}


@pytest.mark.parametrize("config", [{}, OUTPUT | {"architecture": "jump_relu", "model_name": "gemma-3-1b-pt"}])
def test_gemma_scope_2(config, tmp_path):
    loaded = load_sae(str(gemma_scope_2(tmp_path, **config)))
    w = exact(linear(7, 24, **LOWER, flipped=False) | {"threshold": normal(24, seed=5).abs() + 0.5})

    def formula(x):
        pre = x @ w["w_enc"] + w["b_enc"]
        z = relu(pre) * (pre > w["threshold"])
        return z, z @ w["w_dec"] + w["b_dec"]

    assert_computes(loaded, 7, formula)
    assert str(loaded.hook_point) == f"blocks.{12 if config else 9}.hook_resid_post"


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.language_model.layers.3.output", "blocks.3.hook_resid_post"),
        ("model.layers.3.self_attn.o_proj.input", "blocks.3.attn.hook_z"),
        ("model.layers.3.post_feedforward_layernorm.output", "blocks.3.hook_mlp_out"),
        ("model.layers.3.pre_feedforward_layernorm.output", None),
    ],
)
def test_the_config_of_gemma_scope_2_names_a_module(module, expected, tmp_path):
    folder = gemma_scope_2(tmp_path, hf_hook_point_in=module)
    if expected is None:
        with pytest.raises(CheckpointError, match="does not say where it belongs"):
            load_sae(str(folder))
    else:
        assert str(load_sae(str(folder)).hook_point) == expected


def test_only_the_residual_site_of_gemma_scope_2_is_told_without_a_config(tmp_path):
    with pytest.raises(CheckpointError, match="does not say where it belongs"):
        load_sae(str(gemma_scope_2(tmp_path, "attn_out/layer_9_width_16k_l0_medium")))


# ---- Llama Scope and llamascopium


LLAMA_KINDS: dict[str, Config] = {
    "a topk turned jumprelu": {},
    "a jumprelu": {"act_fn": "jumprelu"},
    "without decoder norm": {"sparsity_include_decoder_norm": False},
    "a topk": {"jump_relu_threshold": 0},
    "a topk without decoder norm": {"jump_relu_threshold": None, "sparsity_include_decoder_norm": False},
}


@pytest.mark.parametrize("kind", LLAMA_KINDS)
@pytest.mark.parametrize(("d", "f"), SIZES)
def test_llama_scope(d, f, kind, tmp_path):
    tensors = linear(d, f, **LINEAR, dec="decoder.bias", flipped=True)
    loaded = load_sae(str(llama_scope(tmp_path, d, f, tensors, **LLAMA_KINDS[kind])))
    w, scale = exact(tensors), math.sqrt(d) / NORM
    with_norm = LLAMA_KINDS[kind].get("sparsity_include_decoder_norm", True)
    lengths = np.linalg.norm(w["decoder.weight"], axis=0) if with_norm else np.ones(f)

    def formula(x):  # in the space of scaled activations, with the decoder as it is stored
        pre = scale * x @ w["encoder.weight"].T + w["encoder.bias"]
        if "topk" in kind and "turned" not in kind:
            keep = top(relu(pre * lengths), 5) > 0
        else:
            keep = pre * lengths > 1.5 * scale
        z = pre * keep
        return z * lengths / scale, (z @ w["decoder.weight"].T + w["decoder.bias"]) / scale

    assert_computes(loaded, d, formula)
    assert (loaded.name, str(loaded.hook_point)) == ("L15R-8x", "blocks.15.hook_resid_post")


@pytest.mark.parametrize("norm", ["dataset-wise", "token-wise", "inference"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("layout", ["new", "2025"])
def test_llamascopium(layout, act_fn, with_norm, norm, tmp_path):
    d, f = SIZES[1]
    new = linear(d, f, **NEW, flipped=False)
    log_threshold = 0.3 * normal(f, seed=6)
    if layout == "new":
        tensors = new | {"activation_function.log_jumprelu_threshold": log_threshold}
    else:
        tensors = linear(d, f, **LINEAR, dec="decoder.bias", flipped=True) | {"log_jumprelu_threshold": log_threshold}
    folder = llamascopium(
        tmp_path, tensors, act_fn=act_fn, sparsity_include_decoder_norm=with_norm, norm_activation=norm
    )
    w, threshold = exact(new), np.exp(log_threshold.double().numpy())
    lengths = np.linalg.norm(w["W_D"], axis=1) if with_norm else np.ones(f)

    def formula(x):
        factor = {
            "dataset-wise": math.sqrt(d) / NORM,
            "token-wise": math.sqrt(d) / np.linalg.norm(x, axis=-1, keepdims=True),
            "inference": 1.0,
        }[norm]
        pre = factor * x @ w["W_E"] + w["b_E"]
        gated = pre * lengths
        keep = {"relu": gated > 0, "jumprelu": gated > threshold, "topk": top(relu(gated), 5) > 0}[act_fn]
        z = pre * keep
        return z * (lengths if act_fn == "topk" else 1), (z @ w["W_D"] + w["b_D"]) / factor

    loaded = load_sae(str(folder))
    assert_computes(loaded, d, formula)
    assert (loaded.name, str(loaded.hook_point)) == ("L7R", POINT)


# ---- what is refused


NORM_NAME = "dataset_average_activation_norm.blocks.7.hook_resid_post"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "qwen: lies across": (
        corrupt(qwen_scope, W_enc=normal(7, 24), W_dec=normal(24, 7)),
        r"W_enc \(24, 7\), b_enc \(24,\), W_dec \(7, 24\), b_dec \(7,\) do not fit",
    ),
    "qwen: no bias": (corrupt(qwen_scope, b_enc=None), r"has no tensor 'b_enc'; it has W_dec, W_enc, b_dec$"),
    "qwen: a vector": (corrupt(qwen_scope, W_enc=normal(24)), r"W_enc \(24,\) does not fit; expected two axes$"),
    "qwen: NaN": (corrupt(qwen_scope, b_enc=torch.full((24,), math.nan)), r"has NaN or infinite values in b_enc$"),
    "sparsify: a transcoder": (
        lambda root: sparsify(root, transcode=True),
        r"has transcode, which is not supported; exp",
    ),
    "sparsify: groupmax": (
        lambda root: sparsify(root, activation="groupmax"),
        r"has activation 'groupmax', which is not",
    ),
    "sparsify: signed": (lambda root: sparsify(root, signed=True), r"has signed, which is not supported"),
    "sparsify: a skip": (corrupt(sparsify, W_skip=normal(7, 7)), r"has W_skip, which is not supported"),
    "sparsify: no k": (
        lambda root: sparsify(root, k=None),
        r"cfg\.json gives k as None; expected a whole number above 0$",
    ),
    "sparsify: k no number": (lambda root: sparsify(root, k=True), r"gives k as True"),
    "dictionary: a crosscoder": (
        dictionary_of("AutoEncoder", {"dict_class": "CrossCoder"}),
        r"dict_class 'CrossCoder' is not supported; expected one of AutoEncoder, AutoEncoderNew,",
    ),
    "dictionary: nothing known": (
        corrupt(dictionary_of("AutoEncoder", {"dict_class": None}), bias=None),
        r"dict_class None is not supported",
    ),
    "dictionary: an unset threshold": (
        corrupt(dictionary_of("BatchTopKSAE"), threshold=torch.tensor(-1.0)),
        r"a threshold is below 0; was the BatchTopKSAE trained to the end\?$",
    ),
    "dictionary: no threshold": (corrupt(dictionary_of("BatchTopKSAE"), threshold=None), r"has no tensor 'threshold'"),
    "dictionary: no k": (corrupt(dictionary_of("AutoEncoderTopK"), k=None), r"config\.json gives k as None"),
    "gemma: a transcoder": (
        lambda root: gemma_scope(root, "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_7"),
        r"is of a transcoder or of the embedding, which is not supported$",
    ),
    "gemma: the embedding": (
        lambda root: gemma_scope(root, "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_7"),
        r"is of a transcoder or of the embedding, which is not supported$",
    ),
    "gemma 2: a transcoder": (
        lambda root: gemma_scope_2(root, **OUTPUT | {"hf_hook_point_out": "model.layers.12.mlp.output"}),
        r"is a transcoder, is affine or has another gate than a JumpReLU, which is not supported$",
    ),
    "gemma 2: the transcoders' folder": (
        lambda root: gemma_scope_2(root, "transcoder_all/layer_9_width_16k_l0_small"),
        r"is a transcoder, is affine",
    ),
    "gemma 2: affine": (corrupt(gemma_scope_2, affine_skip_connection=normal(7, 7)), r"is a transcoder, is affine"),
    "gemma 2: another gate": (lambda root: gemma_scope_2(root, architecture="topk"), r"another gate than a JumpReLU"),
    "llama: a transcoder": (
        llama_of(hook_point_out="blocks.15.hook_mlp_out"),
        r"has another hook_point_out than hook_point_in, which is not supported$",
    ),
    "llama: a glu": (llama_of(use_glu_encoder=True), r"has use_glu_encoder, which is not supported$"),
    "llama: a shifted input": (llama_of(apply_decoder_bias_to_pre_encoder=True), r"has apply_decoder_bias_to_pre_enc"),
    "llama: by batch": (llama_of(norm_activation="batch-wise"), r"has norm_activation 'batch-wise', which is not"),
    "llama: no norm": (
        llama_of(dataset_average_activation_norm=None),
        r"gives dataset_average_activation_norm\.in as None; expected a number above 0$",
    ),
    "llama: another gate": (llama_of(act_fn="relu"), r"gives act_fn as 'relu'; expected jumprelu or topk$"),
    "llamascopium: a crosscoder": (llamascopium_of(sae_type="crosscoder"), r"has sae_type 'crosscoder', which is not"),
    "llamascopium: a transcoder": (
        llamascopium_of(hook_point_out="x"),
        r"has another hook_point_out than hook_point_in",
    ),
    "llamascopium: a glu": (llamascopium_of(use_glu_encoder=True), r"has use_glu_encoder, which is not supported$"),
    "llamascopium: by batch": (llamascopium_of(norm_activation="batch-wise"), r"has norm_activation 'batch-wise'"),
    "llamascopium: batchtopk": (
        llamascopium_of(act_fn="batchtopk"),
        r"gives act_fn as 'batchtopk'; expected relu, jump",
    ),
    "llamascopium: no norm": (corrupt(llamascopium_of(), **{NORM_NAME: None}), rf"has no tensor '{NORM_NAME}'"),
    "llamascopium: an unset norm": (
        corrupt(llamascopium_of(), **{NORM_NAME: torch.tensor(0.0)}),
        rf"gives {NORM_NAME} as 0\.0; expected a number above 0$",
    ),
    "llamascopium: a norm of noise": (
        corrupt(llamascopium_of(), **{NORM_NAME: torch.tensor(math.nan)}),
        r"as nan; exp",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reproduced_is_refused(name, tmp_path):
    write, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sae(str(write(tmp_path)))
    assert "\n" not in str(caught.value)
