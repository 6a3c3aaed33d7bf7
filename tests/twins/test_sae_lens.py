"""SAELens directories: what the SAELens package itself writes and reads is what we read; the rest is refused."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_census.compute.effects.edits import Edit, edit
from sae_census.compute.numbers.sae import CodeUnit, Gated, JumpRelu, Relu, SparseAutoencoder, TopK
from sae_census.errors import ArgumentError, CheckpointError, ConfigError
from sae_census.io.checkpoints import LoadedSae, load_sae
from sae_census.io.checkpoints.saving import save_sae

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports a module that its own dependency deprecates
    from sae_lens import SAE, TrainingSAE
    from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler

D, F, B, T = 12, 40, 4, 6
HOOK = "blocks.3.hook_resid_post"
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
INFERENCE: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "topk": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": False},
    "topk rescaled": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
}
TRAINING: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "topk": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": False},
    "topk rescaled": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "batchtopk": {"architecture": "batchtopk", "k": 4.5, "rescale_acts_by_decoder_norm": False},
    "batchtopk rescaled": {"architecture": "batchtopk", "k": 4.5, "rescale_acts_by_decoder_norm": True},
    "matryoshka": {
        "architecture": "matryoshka_batchtopk",
        "k": 4.5,
        "matryoshka_widths": [8, F],
        "rescale_acts_by_decoder_norm": True,
    },
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(B, T, D, seed=7) + 0.2


def randomised(sae: SAE) -> SAE:
    """Every parameter and threshold random; decoder rows of many lengths."""
    with torch.no_grad():
        for seed, (name, weight) in enumerate(sorted(sae.named_parameters())):
            values = 0.3 * normal(*weight.shape, seed=seed)
            weight.copy_(values.abs() if name == "threshold" else values)
        sae.W_dec.mul_(torch.linspace(0.3, 2, F)[:, None])
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.25)
    return sae


def random_sae(architecture: str, *, training: bool = False, hook_name: str = HOOK, **settings: Any) -> SAE:
    """An SAE of SAELens's own classes."""
    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(architecture)
    return randomised(sae_class(config_class(d_in=D, d_sae=F, metadata=SAEMetadata(hook_name=hook_name), **settings)))


def assert_agree(loaded: LoadedSae, theirs: SAE, x: Tensor = X, their_x: Tensor | None = None) -> None:
    """Same codes, same reconstruction and same activation without its error, to 1e-5; not all zero or firing."""
    codes = loaded.sae.encode(x)
    ours = torch.zeros(B, T, F)
    ours[codes.row.tolist(), codes.position.tolist(), codes.feature.tolist()] = torch.from_numpy(codes.value)
    with torch.no_grad():
        expected = theirs.encode(x if their_x is None else their_x)
        reconstruction = theirs.decode(expected).reshape(x.shape)
    assert 0.02 < (expected > 0).float().mean() < 0.8
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.sae.reconstruct(x, codes), reconstruction, rtol=0, atol=1e-5)
    dropped = edit(loaded.sae, x.flatten(0, 1), [Edit(feature=0, value=1.0)], error_term="drop").x
    torch.testing.assert_close(dropped.view(x.shape), reconstruction, rtol=0, atol=1e-5)


@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("normalize_activations", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", INFERENCE)
def test_a_saved_sae_computes_what_sae_lens_computes(kind, normalize_activations, apply_b_dec_to_input, tmp_path):
    theirs = random_sae(
        **INFERENCE[kind], normalize_activations=normalize_activations, apply_b_dec_to_input=apply_b_dec_to_input
    )
    theirs.save_model(tmp_path / "sae")
    loaded = load_sae(str(tmp_path / "sae"))
    assert_agree(loaded, theirs)
    assert (loaded.name, str(loaded.hook_point)) == ("sae", HOOK)


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_a_key_that_the_config_lacks_means_what_sae_lens_takes_it_to_mean(kind, tmp_path):
    random_sae(**INFERENCE[kind]).save_model(tmp_path)
    needed = ("architecture", "d_in", "d_sae", "dtype", "device", "k", "metadata")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({key: config[key] for key in needed if key in config}))
    assert_agree(load_sae(str(tmp_path)), SAE.load_from_disk(tmp_path))


def test_an_sae_on_the_heads_of_attention_reads_them_side_by_side(tmp_path):
    theirs = random_sae("standard", reshape_activations="hook_z", hook_name="blocks.3.attn.hook_z")
    theirs.save_model(tmp_path)
    loaded = load_sae(str(tmp_path))
    assert_agree(loaded, theirs, X, X.unflatten(2, (3, 4)))
    assert str(loaded.hook_point) == "blocks.3.attn.hook_z"


@pytest.mark.parametrize("kind", TRAINING)
def test_an_sae_saved_after_training_computes_what_sae_lens_computes(kind, tmp_path):
    random_sae(training=True, **TRAINING[kind]).save_inference_model(tmp_path)
    assert_agree(load_sae(str(tmp_path)), SAE.load_from_disk(tmp_path))


@pytest.mark.parametrize("kind", TRAINING)
def test_a_training_checkpoint_computes_what_its_inference_sae_computes(kind, tmp_path):
    sae = random_sae(training=True, **TRAINING[kind])
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    assert_agree(load_sae(str(tmp_path / "training")), SAE.load_from_disk(tmp_path / "inference"))


def test_an_older_training_checkpoint_with_log_thresholds_computes_what_sae_lens_computes(tmp_path):
    random_sae("jumprelu", training=True).save_model(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / WEIGHTS)
    assert_agree(load_sae(str(tmp_path)), TrainingSAE.load_from_disk(tmp_path))


@pytest.mark.parametrize("kind", INFERENCE)
def test_an_expected_norm_is_folded_with_the_scale_beside_it(kind, tmp_path):
    theirs = random_sae(**INFERENCE[kind], normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    ActivationScaler(0.37).save(str(tmp_path / "activation_scaler.json"))
    theirs.fold_activation_norm_scaling_factor(0.37)
    assert_agree(load_sae(str(tmp_path)), theirs, X / 0.37)


@pytest.mark.parametrize("kind", TRAINING)
def test_an_expected_norm_of_a_training_checkpoint_is_folded_as_sae_lens_folds_it(kind, tmp_path):
    sae = random_sae(training=True, **TRAINING[kind], normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path / "training")
    ActivationScaler(0.37).save(str(tmp_path / "training/activation_scaler.json"))
    sae.fold_activation_norm_scaling_factor(0.37)
    sae.save_inference_model(tmp_path / "inference")
    assert_agree(load_sae(str(tmp_path / "training")), SAE.load_from_disk(tmp_path / "inference"), X / 0.37)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_computed_in_float32(dtype, tmp_path):
    random_sae("jumprelu", dtype=dtype).save_model(tmp_path)
    assert_agree(load_sae(str(tmp_path)), SAE.load_from_disk(tmp_path, dtype="float32"))


@pytest.mark.parametrize("apply_b_dec_to_input", [False, True])
@pytest.mark.parametrize("normalize_activations", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", INFERENCE)
def test_what_is_written_here_sae_lens_loads_with_equal_codes(
    kind, normalize_activations, apply_b_dec_to_input, tmp_path
):
    random_sae(
        **INFERENCE[kind], normalize_activations=normalize_activations, apply_b_dec_to_input=apply_b_dec_to_input
    ).save_model(tmp_path / "first")
    first = load_sae(str(tmp_path / "first"))
    save_sae(first, first.metadata, tmp_path / "second", save_format="sae_lens", note="a")
    theirs, second = SAE.load_from_disk(tmp_path / "second"), load_sae(str(tmp_path / "second"))
    assert_agree(first, theirs)
    assert_agree(second, theirs)
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.note) == (HOOK, "a")
    assert (second.hook_point, second.sae.unit) == (first.hook_point, first.sae.unit)
    for part in ("w_enc", "b_enc", "w_dec", "b_dec"):
        assert torch.equal(getattr(second.sae, part), getattr(first.sae, part)), part


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_a_bias_before_the_encoder_that_is_not_the_decoders_is_folded(kind, tmp_path):
    random_sae(**INFERENCE[kind], normalize_activations="layer_norm").save_model(tmp_path / "first")
    first = load_sae(str(tmp_path / "first"))
    first = replace(first, sae=replace(first.sae, pre_bias=0.5 * normal(D, seed=3), scale=0.25))
    save_sae(first.sae, {"hook_point": HOOK}, tmp_path / "second", save_format="sae_lens")
    assert_agree(first, SAE.load_from_disk(tmp_path / "second"))


def test_the_factor_in_the_weights_is_noted_as_the_unit_of_codes(tmp_path):
    random_sae("jumprelu", normalize_activations="expected_average_only_in").save_model(tmp_path / "first")
    first = load_sae(str(tmp_path / "first"), norm_scaling_factor=0.25)
    save_sae(first, first.metadata, tmp_path / "second", save_format="sae_lens")
    second = load_sae(str(tmp_path / "second"))
    assert second.unit == first.unit == CodeUnit("scaled", 0.25)
    assert "overrides" not in second.metadata
    assert_agree(second, SAE.load_from_disk(tmp_path / "second"))


def test_an_sae_on_the_heads_of_attention_is_written_for_heads(tmp_path):
    sae = load_sae(write(tmp_path, {}, {})).sae
    save_sae(sae, {"hook_point": "blocks.3.attn.hook_z"}, tmp_path / "z", save_format="sae_lens")
    theirs = SAE.load_from_disk(tmp_path / "z")
    assert_agree(load_sae(str(tmp_path / "z")), theirs, X, X.unflatten(2, (3, 4)))


PARTS = {"w_enc": normal(D, F), "b_enc": torch.zeros(F), "w_dec": normal(F, D), "b_dec": normal(D)}
BIASES = {"b_gate": normal(F), "b_mag": normal(F), "r_mag": torch.zeros(F)}
UNWRITTEN: dict[str, tuple[SparseAutoencoder, dict[str, Any], str]] = {
    "negative codes": (
        SparseAutoencoder(**PARTS, gate=TopK(5, "identity")),
        {},
        r"the TopK gate of the SAE lets negative codes through \(postact identity\), which SAELens cannot say",
    ),
    "own gate": (
        SparseAutoencoder(**PARTS, gate=Gated(**BIASES, w_gate=normal(D, F))),
        {},
        r"the gate of the SAE has a matrix of its own \(W_gate\), which SAELens cannot say",
    ),
    "other size": (
        SparseAutoencoder(**PARTS, gate=Relu()),
        {"d_sae": 41},
        r"config says \{'d_sae': 41\}, but the SAE has \{'d_sae': 40\}",
    ),
    "no place": (SparseAutoencoder(**PARTS, gate=Relu()), {"hook_point": None}, r"it has no hook_point"),
    "no JSON": (SparseAutoencoder(**PARTS, gate=Relu()), {"model": object()}, r"config cannot be saved: Object of"),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_sae_lens_cannot_express_is_refused_before_anything_is_written(name, tmp_path):
    sae, config, message = UNWRITTEN[name]
    with pytest.raises(ArgumentError, match=message):
        save_sae(sae, {"hook_point": HOOK} | config, tmp_path / "out", save_format="sae_lens")
    assert not (tmp_path / "out").exists()


def test_a_directory_and_a_known_format_are_asked_for(tmp_path):
    sae = SparseAutoencoder(**PARTS, gate=Relu())
    with pytest.raises(ArgumentError, match=r"a\.pt; expected a directory, for cfg\.json and sae_weights"):
        save_sae(sae, {"hook_point": HOOK}, tmp_path / "a.pt", save_format="sae_lens")
    with pytest.raises(ArgumentError, match=r"save_format is 'onnx'; expected one of nanochat, sae_lens$"):
        save_sae(sae, {"hook_point": HOOK}, tmp_path / "a.pt", save_format="onnx")


OLD = {"d_in": D, "d_sae": F, "dtype": "float32", "model_name": "gpt2-small", "context_size": 128}
OLD_LAYOUTS = {
    "standard of version 1": ("standard", {"hook_point": HOOK, "hook_point_layer": 3, "expansion_factor": 4}),
    "relu by name": ("standard", {"hook_name": HOOK, "activation_fn_str": "relu", "normalize_activations": "none"}),
    "no normalisation": ("standard", {"hook_name": HOOK, "normalize_activations": None}),
    "false normalisation": ("standard", {"hook_name": HOOK, "normalize_activations": False}),
    "layer norm without b_dec": (
        "standard",
        {"hook_name": HOOK, "normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
    ),
    "topk as an activation": (
        "topk",
        {"hook_name": HOOK, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "architecture": "standard"},
    ),
    "topk of version 5": (
        "topk",
        {"hook_name": HOOK, "activation_fn": "topk", "activation_fn_kwargs": {"k": 5}, "architecture": "topk"},
    ),
    "jumprelu": ("jumprelu", {"hook_name": HOOK, "architecture": "jumprelu", "activation_fn_kwargs": {}}),
    "gated": ("gated", {"hook_name": HOOK, "architecture": "gated", "finetuning_scaling_factor": False}),
}


@pytest.mark.parametrize("name", OLD_LAYOUTS)
def test_layouts_before_version_6_are_read_as_sae_lens_reads_them(name, tmp_path):
    architecture, config = OLD_LAYOUTS[name]
    random_sae(architecture).save_model(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(OLD | config))
    theirs = SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == architecture
    loaded = load_sae(str(tmp_path))
    assert_agree(loaded, theirs)
    assert str(loaded.hook_point) == HOOK
    for key in ("hook_name", "prepend_bos", "model_name", "context_size"):
        assert loaded.metadata[key] == theirs.cfg.metadata[key]


def test_an_old_scaling_factor_of_ones_changes_nothing(tmp_path):
    random_sae("standard").save_model(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(OLD | {"hook_name": HOOK}))
    save_file(load_file(tmp_path / WEIGHTS) | {"scaling_factor": torch.ones(F)}, tmp_path / WEIGHTS)
    assert_agree(load_sae(str(tmp_path)), SAE.load_from_disk(tmp_path))


def test_an_old_true_normalisation_is_folded_with_the_scale_beside_it(tmp_path):
    random_sae("standard").save_model(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(OLD | {"hook_name": HOOK, "normalize_activations": True}))
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
    theirs = SAE.load_from_disk(tmp_path)
    assert theirs.cfg.normalize_activations == "expected_average_only_in"
    theirs.fold_activation_norm_scaling_factor(0.37)
    assert_agree(load_sae(str(tmp_path)), theirs, X / 0.37)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> str:
    """A sound standard SAE with these keys and tensors changed; None leaves one out. Gives its path."""
    keys: dict[str, Any] = {"architecture": "standard", "d_in": D, "d_sae": F, "metadata": {"hook_name": HOOK}} | config
    weights = {"W_enc": normal(D, F), "b_enc": normal(F), "W_dec": normal(F, D), "b_dec": normal(D)} | tensors
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    return str(folder)


GATED = {"b_enc": None, "b_gate": normal(F), "b_mag": normal(F), "r_mag": normal(F)}
NAN = torch.tensor(float("nan"))
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no W_enc": ({}, {"W_enc": None}, r"has no tensor 'W_enc'; it has W_dec, b_dec, b_enc$"),
    "no W_dec": ({}, {"W_dec": None}, r"has no tensor 'W_dec'; it has W_enc, b_dec, b_enc$"),
    "no b_dec": ({}, {"b_dec": None}, r"has no tensor 'b_dec'; it has W_dec, W_enc, b_enc$"),
    "no b_enc": ({}, {"b_enc": None}, r"has no tensor 'b_enc'; it has W_dec, W_enc, b_dec$"),
    "no threshold": (
        {"architecture": "jumprelu"},
        {},
        r"has no tensor 'threshold'; it has W_dec, W_enc, b_dec, b_enc$",
    ),
    "no b_gate": ({"architecture": "gated"}, GATED | {"b_gate": None}, r"has no tensor 'b_gate'; it has"),
    "no b_mag": ({"architecture": "gated"}, GATED | {"b_mag": None}, r"has no tensor 'b_mag'; it has"),
    "no r_mag": ({"architecture": "gated"}, GATED | {"r_mag": None}, r"has no tensor 'r_mag'; it has"),
    "W_dec lies across": (
        {},
        {"W_dec": normal(D, F)},
        r"W_enc \(12, 40\), b_enc \(40,\), W_dec \(12, 40\), b_dec \(12,\) do not fit; expected \(D, F\), \(F,\), ",
    ),
    "b_enc too short": ({}, {"b_enc": normal(F - 1)}, r"b_enc \(39,\).* do not fit"),
    "b_dec too long": ({}, {"b_dec": normal(D + 1)}, r"b_dec \(13,\) do not fit"),
    "b_dec a column": ({}, {"b_dec": normal(D, 1)}, r"b_dec \(12, 1\) do not fit"),
    "W_enc a vector": ({}, {"W_enc": normal(D)}, r"W_enc \(12,\).* do not fit"),
    "W_enc a number": ({}, {"W_enc": torch.tensor(1.0)}, r"W_enc \(\).* do not fit"),
    "threshold too short": (
        {"architecture": "jumprelu"},
        {"threshold": torch.ones(F - 1)},
        r"threshold \(39,\) does not fit; expected \(40,\)",
    ),
    "b_gate too short": (
        {"architecture": "gated"},
        GATED | {"b_gate": normal(F - 1)},
        r"b_gate \(39,\) does not fit; expected \(40,\)",
    ),
    "NaN in W_enc": ({}, {"W_enc": NAN.expand(D, F).contiguous()}, r"has NaN or infinite values in w_enc$"),
    "infinity in b_enc": ({}, {"b_enc": torch.full((F,), torch.inf)}, r"has NaN or infinite values in b_enc$"),
    "NaN in W_dec": ({}, {"W_dec": NAN.expand(F, D).contiguous()}, r"has NaN or infinite values in w_dec$"),
    "NaN in b_dec": ({}, {"b_dec": NAN.expand(D).contiguous()}, r"has NaN or infinite values in b_dec$"),
    "NaN in a threshold": (
        {"architecture": "jumprelu"},
        {"threshold": NAN.expand(F).contiguous()},
        r"has NaN or infinite values in threshold$",
    ),
    "NaN in r_mag": (
        {"architecture": "gated"},
        GATED | {"r_mag": NAN.expand(F).contiguous()},
        r"has NaN or infinite values in r_mag$",
    ),
    "threshold below 0": (
        {"architecture": "jumprelu"},
        {"threshold": torch.linspace(-0.1, 1, F)},
        r"a threshold is below 0; was the SAE trained to the end\?$",
    ),
    "no architecture": ({"architecture": None}, {}, r"architecture None is not supported; expected one of standard, "),
    "no scale": (
        {"normalize_activations": "expected_average_only_in"},
        {},
        r"expects activations scaled by a factor that it does not hold .* or in activation_scaler\.json as",
    ),
    "whitened": (
        {"normalize_activations": "covariance_whitening"},
        {},
        r"normalize_activations 'covariance_whitening' is not supported$",
    ),
    "finetuned": (
        {},
        {"scaling_factor": normal(F)},
        r"holds a finetuned scaling_factor, which SAELens no longer defines$",
    ),
    "topk without k": ({"architecture": "topk"}, {}, r"is of a topk SAE but gives k as None$"),
    "topk of half": ({"architecture": "topk", "k": 0.5}, {}, r"is of a topk SAE but gives k as 0\.5$"),
    "topk of nothing": ({"architecture": "topk", "k": 0}, {}, r"is of a topk SAE but gives k as 0$"),
    "old topk without k": ({"metadata": None, "activation_fn": "topk"}, {}, r"is of a topk SAE but gives k as None$"),
    "old tanh": (
        {"metadata": None, "activation_fn_str": "tanh-relu"},
        {},
        r"^cfg\.json names activation_fn 'tanh-relu'; expected relu or topk$",
    ),
    "no hook point": (
        {"metadata": {}},
        {},
        r"does not say where it belongs; give saes\[\]\.hook_point=blocks\.<layer>\.…$",
    ),
    "no hook point in the old layout": ({"metadata": None}, {}, r"does not say where it belongs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reproduced_is_refused(name, tmp_path):
    config, tensors, message = REFUSED[name]
    path = write(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_sae(path)


@pytest.mark.parametrize("architecture", sorted({*SAE_CLASS_REGISTRY} - {"standard", "topk", "jumprelu", "gated"}))
def test_every_other_architecture_of_sae_lens_is_refused(architecture, tmp_path):
    path = write(tmp_path, {"architecture": architecture}, {})
    message = rf"architecture '{architecture}' is not supported; expected one of standard, topk, jumprelu, .*gated$"
    with pytest.raises(CheckpointError, match=message):
        load_sae(path)


def rewrite(file: str, text: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(text)


def truncate_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (truncate_weights, r"^the weights in .* are not a sound safetensors file: "),
    "weights of noise": (rewrite(WEIGHTS, bytes(range(256))), r"^the weights in .* are not a sound safetensors file: "),
    "no weights at all": (rewrite(WEIGHTS, b""), r"^the weights in .* are not a sound safetensors file: "),
    "config cut short": (rewrite(CONFIG, b'{"architecture": '), r"^the config in .* is not JSON: "),
    "config no text": (rewrite(CONFIG, b"\xff\xfe\x00"), r"^the config in .* is not JSON: "),
    "config a list": (rewrite(CONFIG, b"[1]"), r"cfg\.json holds no JSON object$"),
    "weights gone": (
        lambda folder: (folder / WEIGHTS).unlink(),
        r"is not an SAE checkpoint of a known format \(sae_lens.*\); it has cfg\.json; expected for example cfg\.json",
    ),
    "all gone": (lambda folder: [file.unlink() for file in folder.iterdir()], r"it has no files; expected for example"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(name, tmp_path):
    damage, message = DAMAGED[name]
    path = write(tmp_path, {}, {})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_sae(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"activation_scaler\.json gives scaling_factor as None; expected a number above 0$"),
        ('{"scaling_factor": null}', r"activation_scaler\.json gives scaling_factor as None"),
        ('{"scaling_factor": 0}', r"activation_scaler\.json gives scaling_factor as 0"),
        ('{"scaling_factor": "2"}', r"activation_scaler\.json gives scaling_factor as '2'"),
        ("0.5", r"activation_scaler\.json holds no JSON object$"),
        ("{", r"^the config in .* is not JSON: "),
    ],
)
def test_a_scale_that_is_no_positive_number_is_refused(text, message, tmp_path):
    path = write(tmp_path, {"normalize_activations": "expected_average_only_in"}, {})
    (tmp_path / "activation_scaler.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_sae(path)


def test_an_unknown_hook_point_is_refused(tmp_path):
    path = write(tmp_path, {"metadata": {"hook_name": "blocks.3.attn.hook_q"}}, {})
    with pytest.raises(ConfigError, match=r"^hook point 'blocks\.3\.attn\.hook_q' is not known"):
        load_sae(path)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"^SAE format 'pickle' is not known; expected one of sae_lens"):
        load_sae(write(tmp_path, {}, {}), format_name="pickle")


def test_a_directory_of_another_format_than_was_said_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"is not laid out as sae_lens; it has notes\.txt$"):
        load_sae(str(tmp_path), format_name="sae_lens")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere/at/all", "~/nowhere/at/all", "nowhere"])
def test_a_path_where_nothing_lies_is_refused(path):
    message = rf"^SAE path {re.escape(path)} does not exist; expected a directory or a hub id org/repo\[/folder\]$"
    with pytest.raises(CheckpointError, match=message):
        load_sae(path)


def test_a_hub_id_that_cannot_be_reached_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"^SAE nobody/nothing/layer_3 is neither a local directory nor reachable"
    ):
        load_sae("nobody/nothing/layer_3")


def test_what_the_user_says_overrides_the_name_and_the_hook_point(tmp_path):
    loaded = load_sae(write(tmp_path, {}, {}), hook_point="model.layers.7", name="mine", format_name="sae_lens")
    assert (loaded.name, str(loaded.hook_point)) == ("mine", "blocks.7.hook_resid_post")


def test_the_path_of_a_file_of_the_checkpoint_will_do(tmp_path):
    path = write(tmp_path, {}, {})
    assert load_sae(f"{path}/{WEIGHTS}").digest == load_sae(path).digest


def test_the_digest_changes_with_every_file_and_with_nothing_else(tmp_path):
    def digest() -> str:
        return load_sae(str(tmp_path)).digest

    write(tmp_path, {}, {})
    first = digest()
    (tmp_path / "sparsity.safetensors").touch()
    assert digest() == first
    write(tmp_path, {"device": "cuda"}, {})
    second = digest()
    write(tmp_path, {"device": "cuda"}, {"b_dec": normal(D, seed=1)})
    assert len({first, second, digest()}) == 3


def test_the_digest_changes_with_the_scale(tmp_path):
    path = write(tmp_path, {"normalize_activations": "expected_average_only_in"}, {})
    digests = set()
    for scale in (0.5, 2.0):
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
        digests.add(load_sae(path).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("architecture", "gate"), [("standard", Relu), ("topk", TopK), ("jumprelu", JumpRelu), ("gated", Gated)]
)
def test_every_architecture_is_read_into_its_gate(architecture, gate, tmp_path):
    random_sae(architecture).save_model(tmp_path)
    sae = load_sae(str(tmp_path)).sae
    assert type(sae.gate) is gate
    assert (sae.width, sae.num_features) == (D, F)
