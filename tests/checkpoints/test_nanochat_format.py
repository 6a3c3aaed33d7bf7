"""nanochat SAE checkpoints: what its formulas say is what we compute; best files win; no pickle is ever loaded."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae_census
from sae_census.compute.effects.edits import Edit, edit
from sae_census.compute.numbers.sae import CodeUnit, Gate, Gated, JumpRelu, Relu, SparseAutoencoder, TopK
from sae_census.errors import ArgumentError, CheckpointError
from sae_census.io.checkpoints import load_sae
from sae_census.io.checkpoints.directory import load_saes
from sae_census.io.checkpoints.nanochat import canonical
from sae_census.io.checkpoints.saving import save_sae

D, F, K = 12, 40, 5
HOOK = "blocks.3.hook_resid_post"
ACTIVATIONS = ("topk", "relu", "gated")
X = torch.randn(4, 6, D, generator=torch.Generator().manual_seed(7)) + 0.2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config_of(activation: str, hook_point: str = HOOK, **changes: Any) -> dict[str, Any]:
    sizes = {"d_in": D, "d_sae": F, "activation": activation, "k": K, "hook_point": hook_point}
    return sizes | {"l1_coefficient": 0.001, "normalize_decoder": True, "dtype": "bfloat16"} | changes


def state_of(activation: str, seed: int = 0) -> dict[str, Tensor]:
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    if activation == "gated":
        shapes |= {"W_gate": (D, F), "b_gate": (F,)}
    return {name: normal(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def write(path: Path, activation: str = "topk", *, seed: int = 0, hook_point: str = HOOK, **more: Any) -> Path:
    """A checkpoint as the trainer writes it, with its other keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "sae_state_dict": state_of(activation, seed),
        "config": config_of(activation, hook_point),
        "step": 100,
        "epoch": 1,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "feature_counts": torch.zeros(F),
    } | more
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, path)
    return path


def literal(activation: str, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The codes (N, F) by the format's formulas, which let negative values through, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    pre = x.double() @ state["W_enc"] + state["b_enc"]
    match activation:
        case "topk":
            best = pre.topk(K, dim=1)
            return torch.zeros_like(pre).scatter(1, best.indices, best.values)
        case "relu":
            return pre.relu()
        case _:
            return pre * (x.double() @ state["W_gate"] + state["b_gate"] > 0)


def dense(sae: SparseAutoencoder, x: Tensor = X) -> Tensor:
    codes = sae.encode(x)
    z = torch.zeros(*x.shape[:2], sae.num_features)
    z[codes.row.tolist(), codes.position.tolist(), codes.feature.tolist()] = torch.from_numpy(codes.value)
    return z.flatten(0, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_are_the_positive_ones_of_the_formula(activation: str, tmp_path: Path) -> None:
    loaded = load_sae(str(write(tmp_path / "saes" / "layer_3.pt", activation)))
    expected = literal(activation, state_of(activation), X.flatten(0, 1))
    torch.testing.assert_close(dense(loaded.sae), expected.clamp(min=0).float(), rtol=1e-5, atol=1e-5)
    assert (expected < 0).any() == (activation == "gated")
    assert (loaded.name, str(loaded.hook_point)) == ("saes", HOOK)
    assert loaded.metadata == config_of(activation) | {"hook_name": HOOK}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_edit_sees_the_negative_codes_of_the_formula_too(activation: str, tmp_path: Path) -> None:
    sae, state = load_sae(str(write(tmp_path / "layer_3.pt", activation))).sae, state_of(activation)
    sae.b_enc[:] = state["b_enc"] = state["b_enc"] - 4  # few codes of the topk are positive now
    if isinstance(sae.gate, Gated):
        sae.gate.b_mag[:] = state["b_enc"]
        sae.b_enc[:] = 0
    x = X.flatten(0, 1)
    z = literal(activation, state, x).float()
    assert (z < 0).any() == (activation != "relu")
    feature = int(z.min(dim=0).values.argmin())
    whole = z @ state["W_dec"] + state["b_dec"]
    step = z[:, feature, None] * state["W_dec"][feature]
    dropped = edit(sae, x, [Edit(feature=feature, value=0.0)], error_term="drop").x
    torch.testing.assert_close(dropped, whole - step, rtol=1e-4, atol=1e-4)
    kept = edit(sae, x, [Edit(feature=feature, value=-1.0)]).x
    torch.testing.assert_close(kept, x - 2 * step, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [TopK(K), Gated(normal(F, seed=4), normal(F, seed=5), 0.3 * normal(F))])
def test_the_relu_of_a_gate_and_the_unit_of_codes_survive_saving(gate: Gate, tmp_path: Path) -> None:
    parts = {"w_enc": normal(D, F), "b_enc": torch.zeros(F), "w_dec": normal(F, D, seed=2), "b_dec": normal(D, seed=3)}
    sae = SparseAutoencoder(**parts, gate=gate, scale=0.5, decoder_norm=True)
    save_sae(sae, {"hook_point": HOOK}, tmp_path / "a.pt")
    assert load_sae(str(tmp_path / "a.pt")).sae.gate.postact == "relu"
    assert load_sae(str(tmp_path / "a.pt")).unit == sae.unit == CodeUnit("scaled", 0.5, decoder_norm=True)
    with pytest.raises(ArgumentError, match=r"config says \{'postact': 'identity'\}, but the SAE has"):
        save_sae(sae, {"hook_point": HOOK, "postact": "identity"}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="gives postact as 'tanh'; expected relu or identity"):
        load_sae(str(write(tmp_path / "c" / "a.pt", "topk", config=config_of("topk") | {"postact": "tanh"})))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saving_and_loading_keep_weights_and_config_to_the_bit(activation: str, tmp_path: Path) -> None:
    first = load_sae(str(write(tmp_path / "first.pt", activation)))
    config = config_of(activation)
    save_sae(first.sae, config, tmp_path / "deep" / "second.pt", step=7, note="a", sae_state_dict=torch.ones(1))
    second = load_sae(str(tmp_path / "deep" / "second.pt"))
    assert second.metadata == first.metadata
    written = torch.load(tmp_path / "deep" / "second.pt", weights_only=True)
    for name, tensor in state_of(activation).items():
        assert torch.equal(written["sae_state_dict"][name], tensor), name
    assert written["config"] == config
    assert written["metadata"].keys() == {"step", "note", "sae_state_dict"}
    assert json.loads((tmp_path / "deep" / "second.config.json").read_text()) == config
    assert torch.equal(dense(second.sae), dense(first.sae))
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["second.config.json", "second.pt"]


@pytest.mark.parametrize("gate", ["relu", "topk", "gated"])
def test_a_pre_encoder_bias_and_a_shared_gate_matrix_are_folded(gate: str, tmp_path: Path) -> None:
    gates = {"relu": Relu(), "topk": TopK(K), "gated": Gated(normal(F, seed=4), normal(F, seed=5), 0.3 * normal(F))}
    sae = SparseAutoencoder(
        w_enc=normal(D, F),
        b_enc=torch.zeros(F) if gate == "gated" else normal(F, seed=1),
        w_dec=normal(F, D, seed=2),
        b_dec=normal(D, seed=3),
        gate=gates[gate],
        pre_bias=normal(D, seed=6),
    )
    save_sae(sae, {"hook_point": HOOK}, tmp_path / "a.pt")
    loaded = load_saes(tmp_path)[HOOK]
    assert 0.05 < (dense(sae) > 0).float().mean() < 0.7
    torch.testing.assert_close(dense(loaded), dense(sae), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        loaded.reconstruct(X, loaded.encode(X)), sae.reconstruct(X, sae.encode(X)), rtol=1e-4, atol=1e-4
    )


def test_two_saes_of_one_folder_keep_their_own_configs(tmp_path: Path) -> None:
    sae = load_sae(str(write(tmp_path / "x" / "a.pt", "relu"))).sae
    for layer in (1, 2):
        save_sae(sae, config_of("relu", f"blocks.{layer}.hook_mlp_out"), tmp_path / f"layer_{layer}.pt")
    assert list(load_saes(tmp_path)) == ["blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"]
    assert list(load_saes(str(tmp_path), "cpu", ["blocks.2.hook_mlp_out"])) == ["blocks.2.hook_mlp_out"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no hook_point"),
        ({"hook_point": "blocks.1.nowhere"}, "'blocks.1.nowhere' is not known"),
        ({"hook_point": HOOK, "d_in": 13}, r"config says \{'d_in': 13\}, but the SAE has \{'d_in': 12\}"),
        ({"hook_point": HOOK, "activation": "topk"}, "but the SAE has {'activation': 'relu'}"),
        ({"hook_point": HOOK, "model": object()}, "config cannot be saved: Object of type object is not JSON"),
    ],
)
def test_a_config_that_is_wrong_is_refused_before_anything_is_written(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sae = load_sae(str(write(tmp_path / "a.pt", "relu"))).sae
    with pytest.raises(ValueError, match=message):
        save_sae(sae, config, tmp_path / "out" / "b.pt")
    assert not (tmp_path / "out").exists()


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    parts = {"w_enc": normal(D, F), "b_enc": normal(F), "w_dec": normal(F, D), "b_dec": normal(D)}
    config = {"hook_point": HOOK}
    with pytest.raises(ArgumentError, match="a JumpRelu gate has no name in this format; it has topk, relu, gated"):
        save_sae(SparseAutoencoder(**parts, gate=JumpRelu(torch.zeros(F))), config, tmp_path / "a.pt")
    with pytest.raises(ArgumentError, match=r"normalises its input \(layer_norm\)"):
        save_sae(SparseAutoencoder(**parts, gate=Relu(), transform="layer_norm"), config, tmp_path / "a.pt")
    with pytest.raises(ArgumentError, match=r"expected a file that ends in \.pt"):
        save_sae(SparseAutoencoder(**parts, gate=Relu()), config, tmp_path / "a.safetensors")
    with pytest.raises(ArgumentError, match="metadata when, note must be tensors and plain values"):
        save_sae(SparseAutoencoder(**parts, gate=Relu()), config, tmp_path / "a.pt", when=Path("x"), note="")
    assert list(tmp_path.iterdir()) == []


def test_the_best_model_wins_then_the_highest_step_and_what_was_taken_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sae_census")
    write(tmp_path / "a" / "checkpoint_step900.pt", seed=1)
    write(tmp_path / "a" / "checkpoint_step1000.pt", seed=2)
    write(tmp_path / "a" / "notes.pt", seed=9)
    assert torch.equal(load_saes(tmp_path)[HOOK].w_dec, state_of("topk", 2)["W_dec"])
    assert "checkpoint_step900.pt is passed over: checkpoint_step1000.pt comes first" in caplog.text
    write(tmp_path / "a" / "best_model.pt", seed=3)
    assert torch.equal(load_saes(tmp_path)[HOOK].w_dec, state_of("topk", 3)["W_dec"])
    assert torch.equal(load_sae(str(tmp_path / "a")).sae.w_dec, state_of("topk", 3)["W_dec"])
    assert f"loaded the SAE for {HOOK} from {tmp_path / 'a' / 'best_model.pt'}" in caplog.text
    write(tmp_path / "b" / "best_model.pt", seed=4, hook_point="blocks.4.hook_resid_post")
    assert list(load_saes(tmp_path)) == [HOOK, "blocks.4.hook_resid_post"]
    write(tmp_path / "c" / "best_model.pt", seed=5)
    with pytest.raises(CheckpointError, match=rf"are both for {HOOK}, and neither is a later checkpoint"):
        load_saes(tmp_path)


def test_files_without_a_config_are_skipped_aloud_and_one_beside_them_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.pt", config=None)
    assert load_saes(tmp_path) == {}
    assert f"no config found for {path}, skipping" in caplog.text
    assert f"no SAEs found in {tmp_path}" in caplog.text
    with pytest.raises(CheckpointError, match=r"has no config in it, and there is no a\.config\.json or config\.json"):
        load_sae(str(path))
    (tmp_path / "config.json").write_text(json.dumps(config_of("topk")))
    shared = load_sae(str(path))
    assert list(load_saes(tmp_path)) == [HOOK]
    (tmp_path / "a.config.json").write_text(json.dumps(config_of("topk", "blocks.5.hook_mlp_out")))
    own = load_sae(str(path))
    assert str(own.hook_point) == "blocks.5.hook_mlp_out"
    assert own.digest != shared.digest
    (tmp_path / "a.config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_sae(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_point": None}, "has no hook_point"),
        ({"activation": None, "d_in": None}, "has no d_in, activation"),
        ({"hook_point": "somewhere"}, "hook point 'somewhere' is not known"),
        ({"activation": "abs"}, "activation 'abs' is not known; expected one of topk, relu, gated"),
        ({"activation": "gated"}, r"W_gate is missing; expected \(12, 40\)"),
        ({"d_sae": 41}, r"W_enc is \(12, 40\); expected \(12, 41\) by its config"),
        ({"k": 0}, "gives k as 0"),
    ],
)
def test_configs_that_lack_keys_or_contradict_the_tensors_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.pt", config=config_of("topk") | changes)
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(path))


def test_a_width_that_is_not_given_follows_from_the_expansion_factor(tmp_path: Path) -> None:
    state = {"W_enc": normal(D, 96), "b_enc": normal(96), "W_dec": normal(96, D), "b_dec": normal(D)}
    path = write(tmp_path / "a.pt", sae_state_dict=state, config=config_of("topk", d_sae=None))
    assert load_sae(str(path)).sae.num_features == 96


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = state_of("relu") | {"b_dec": torch.full((D,), torch.nan)}
    with pytest.raises(CheckpointError, match="NaN or infinite values in b_dec"):
        load_sae(str(write(tmp_path / "a.pt", "relu", sae_state_dict=state)))


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_objects_are_refused_and_never_run(old_format: bool, tmp_path: Path) -> None:
    path, trap = tmp_path / "saes" / "a.pt", tmp_path / "trap"
    path.parent.mkdir()
    checkpoint = {"sae_state_dict": state_of("relu"), "config": config_of("relu"), "extra": Bomb(trap)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not old_format)
    for load in (lambda: load_sae(str(path)), lambda: load_saes(path.parent)):
        with pytest.raises(CheckpointError, match="are never loaded"):
            load()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"not a (plain|sound) torch file"):
        load_sae(str(path))
    assert not trap.exists()


def test_files_of_the_old_serialisation_and_narrow_types_are_read(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in state_of("relu").items()}
    path = write(tmp_path / "a.pt", "relu", sae_state_dict=state)
    loaded = load_sae(str(path)).sae
    assert loaded.w_enc.dtype == torch.float32
    assert torch.equal(loaded.w_enc, state["W_enc"].float())
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_sae(str(path)).sae.w_enc, loaded.w_enc)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("hook_attn", "hook_attn_out"), ("hook_mlp", "hook_mlp_out"), ("attn", "hook_attn_out"), ("mlp", "hook_mlp_out")],
)
def test_the_add_ons_names_of_hook_points_are_read(name: str, meant: str, tmp_path: Path) -> None:
    given, known = f"blocks.3.{name}", f"blocks.3.{meant}"
    path = write(tmp_path / "a.pt", hook_point=given)
    assert list(load_saes(tmp_path)) == list(load_saes(tmp_path, hook_points=[given])) == [known]
    assert load_saes(tmp_path, hook_points=["blocks.3.hook_resid_post"]) == {}
    assert str(load_sae(str(path)).hook_point) == known
    with pytest.raises(ValueError, match=r"hook point 'blocks\.3\.out' is not known"):
        load_saes(tmp_path, hook_points=["blocks.3.out"])


def test_one_bad_file_does_not_spoil_a_directory_and_only_bad_ones_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = write(tmp_path / "a" / "best_model.pt", config=config_of("topk", k=0), seed=1)
    with pytest.raises(CheckpointError, match="gives k as 0"):
        load_saes(tmp_path)
    write(tmp_path / "a" / "checkpoint_step9.pt", seed=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "best_model.pt").write_bytes(b"cut short")
    torch.save({"something": 1}, tmp_path / "checkpoint_1.pt")
    assert torch.equal(load_saes(tmp_path)[HOOK].w_dec, state_of("topk", 2)["W_dec"])
    for name in (str(bad), "b/best_model.pt", "checkpoint_1.pt is no nanochat SAE"):
        assert name in caplog.text
    assert caplog.text.count("skipping a file that is not sound") == 3
    (tmp_path / "a" / "checkpoint_step9.pt").unlink()
    with pytest.raises(CheckpointError, match=r"\(2 more files are not sound\)"):
        load_saes(tmp_path)


class AddOnConfig:
    """The part of the add-on's config that we meet."""

    def __init__(self, **changes: Any):
        vars(self).update(config_of("topk") | changes)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class AddOnSae(torch.nn.Module):
    """The add-on's SAE: parameters of these names, and `encode` before the gate."""

    def __init__(self, activation: str, config: Any):
        super().__init__()
        self.config = config
        for name, tensor in state_of(activation).items():
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.W_enc + self.b_enc

    def get_feature_activations(self, x: Tensor) -> Tensor:
        return literal(self.config.activation, self.state_dict(), x).float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_objects_of_the_add_on_are_taken_as_they_are(activation: str, tmp_path: Path) -> None:
    config = AddOnConfig(activation=activation)
    sae = AddOnSae(activation, config)
    expected = literal(activation, state_of(activation), X.flatten(0, 1)).clamp(min=0).float()
    torch.testing.assert_close(dense(canonical(sae)), expected, rtol=1e-5, atol=1e-5)
    assert not canonical(sae).w_enc.requires_grad
    save_sae(sae, config, tmp_path / "a.pt", step=3)
    loaded = load_sae(str(tmp_path / "a.pt"))
    assert loaded.metadata == config.to_dict() | {"hook_name": HOOK}
    torch.testing.assert_close(dense(loaded.sae), expected, rtol=1e-5, atol=1e-5)
    save_sae(loaded, config, tmp_path / "b.pt")
    assert torch.equal(dense(load_sae(str(tmp_path / "b.pt")).sae), dense(loaded.sae))


def test_other_objects_are_refused_with_the_way_out(tmp_path: Path) -> None:
    sae = AddOnSae("topk", AddOnConfig(d_in=13))
    for wrong, why in (
        (sae, r"W_enc is \(12, 40\); expected"),
        (torch.nn.Linear(2, 2), "its|it is a NoneType"),
        (3, ""),
    ):
        with pytest.raises(ValueError, match=rf"cannot be taken as an SAE: .*{why}.*give what load_sae makes of that"):
            canonical(wrong)
    with pytest.raises(ValueError, match="config cannot be saved: it is a str; expected a mapping"):
        save_sae(AddOnSae("topk", AddOnConfig()), "config", tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_missing_directories_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^SAE directory does not exist: .*nowhere$"):
        load_saes(tmp_path / "nowhere")
    torch.save({"model": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"model\.pt is no nanochat SAE: expected a dict with sae_state_dict, it has"
    ):
        load_saes(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not an SAE checkpoint of a known format"):
        load_sae(str(tmp_path / "model.pt"))


def test_the_package_offers_both_functions() -> None:
    assert sae_census.load_saes is load_saes
    assert sae_census.save_sae is save_sae
