"""Settings that only SAELens' list of releases has: applied where the path tells the release, asked for where not."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import NORM, POINT, WRITERS, corrupt, llamascopium_of, qwen_scope, sparsify

from sae_census.compute.numbers.sae import CodeUnit
from sae_census.config import SaeConfig
from sae_census.errors import CheckpointError, ConfigError
from sae_census.io.checkpoints import LoadedSae, load_sae, releases
from sae_census.steps.model.reader import load_saes
from sae_census.steps.model.sae_map import saes_named

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it imports a module that its own dependency deprecates
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

D, F = 12, 40
RESCALED = "constant_norm_rescale"
EXPECTED = "expected_average_only_in"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = 3 * normal(4, 6, D, seed=7) + 0.2


def write(folder: Path, **config: Any) -> Path:
    """A standard SAE in the layout before version 6."""
    folder.mkdir(parents=True)
    tensors = {"W_enc": normal(D, F), "b_enc": normal(F, seed=1), "W_dec": normal(F, D, seed=2), "b_dec": normal(D)}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "dtype": "float32"} | config))
    return folder


def codes(loaded: LoadedSae) -> torch.Tensor:
    found, dense = loaded.sae.encode(X), torch.zeros(4, 6, F)
    dense[found.row.tolist(), found.position.tolist(), found.feature.tolist()] = torch.from_numpy(found.value)
    return dense


LISTED = [
    ("mistral-7b-res-wg", "blocks.16.hook_resid_pre", None),
    ("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out", EXPECTED),
    ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", None),
    ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_768", None),
    ("gemma-2b-res-jb", "blocks.12.hook_resid_post", EXPECTED),
]


@pytest.mark.parametrize(("release", "sae_id", "said"), LISTED)
def test_a_folder_of_a_release_computes_what_sae_lens_computes_by_its_list(
    release: str, sae_id: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = get_pretrained_saes_directory()[release]
    hook_name = sae_id.removesuffix("_768")
    folder = write(
        tmp_path / listed.repo_id / listed.saes_map[sae_id],
        model_name=listed.model,
        hook_point=hook_name,
        normalize_activations=said,
    )

    def download(repo_id: str, filename: str, **_: Any) -> str:
        path = tmp_path / repo_id / filename
        if not path.is_file():
            raise pretrained_sae_loaders.EntryNotFoundError("no such file")
        return str(path)

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the model should be centred, which is what is compared
        theirs, config, _ = SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id)
    ours = load_sae(str(folder))
    with torch.no_grad():
        expected = theirs.encode(X)
        torch.testing.assert_close(codes(ours), expected, rtol=1e-5, atol=1e-5)
        made = ours.sae.reconstruct(X, ours.sae.encode(X))
        torch.testing.assert_close(made, theirs.decode(expected), rtol=1e-5, atol=1e-4)
    key = "center_writing_weights"
    kwargs = config["metadata"].get("model_from_pretrained_kwargs") or {}
    assert (ours.metadata.get("model_from_pretrained_kwargs") or {}).get(key) == kwargs.get(key)
    cache = tmp_path / f"models--{listed.repo_id.replace('/', '--')}" / "snapshots" / "0a1b"
    cache.mkdir(parents=True)
    cached = folder.rename(cache / folder.name)
    assert torch.equal(codes(load_sae(str(cached))), codes(ours))
    assert load_sae(str(cached)).digest == ours.digest


def test_the_table_is_what_the_installed_list_overrides_in_a_folder_of_its_own() -> None:
    ours = {one.name: one for one in releases.RELEASES}
    found = {}
    for name, listed in get_pretrained_saes_directory().items():
        overrides = {key: value for key, value in (listed.config_overrides or {}).items() if key != "dataset_path"}
        if listed.conversion_func is None and (overrides or listed.norm_scaling_factor):
            found[name] = (listed, overrides)
    assert found.keys() == ours.keys()
    for name, (listed, overrides) in found.items():
        one = ours[name]
        kwargs = overrides.pop("model_from_pretrained_kwargs", {})
        assert kwargs == ({"center_writing_weights": True} if one.center_writing_weights else {})
        said = {"normalize_activations": one.normalize_activations} if one.normalize_activations else {}
        assert overrides == said
        assert one.norm_scaling_factors == listed.norm_scaling_factor
        assert listed.repo_id.rsplit("/", 1)[1] == one.repository


def test_a_release_taken_out_of_its_repository_is_asked_about(tmp_path: Path) -> None:
    hook = {"hook_point": "blocks.16.hook_resid_pre"}
    for folder in (
        write(tmp_path / "mistral_7b_layer_16", **hook),
        write(tmp_path / "mine", **hook, model_name="mistralai/Mistral-7B-v0.1"),
    ):
        message = rf"looks like the release mistral-7b-res-wg.*saes\[\]\.normalize_activations={RESCALED}, or none"
        with pytest.raises(CheckpointError, match=message):
            load_sae(str(folder))
        asked = load_sae(str(folder), normalize_activations=RESCALED)
        plain = load_sae(str(folder), normalize_activations="none")
        assert codes(plain).max() > 2 * codes(asked).max() / 1.5
        assert asked.digest != plain.digest
        assert (str(asked.unit), str(plain.unit)) == (
            "activations brought to length sqrt(D), token by token",
            "raw activations",
        )
    other = write(tmp_path / "other", hook_point="blocks.17.hook_resid_pre", model_name="mistral-7b")
    assert load_sae(str(other)).sae.transform == "none"


def test_a_factor_that_no_file_holds_is_taken_from_the_user_and_part_of_the_digest(tmp_path: Path) -> None:
    folder = write(tmp_path / "sae", hook_name="blocks.1.hook_resid_post", normalize_activations=EXPECTED)
    with pytest.raises(CheckpointError, match=r"give it as saes\[\]\.norm_scaling_factor or in activation_scaler"):
        load_sae(str(folder))
    (given,) = load_saes([SaeConfig(path=str(folder), norm_scaling_factor=0.25)]).values()
    other = load_sae(str(folder), norm_scaling_factor=0.5)
    assert given.digest != other.digest
    assert given.unit == CodeUnit("scaled", 0.25)
    theirs = SAE.load_from_disk(folder)
    theirs.fold_activation_norm_scaling_factor(0.25)
    with torch.no_grad():
        torch.testing.assert_close(codes(given), theirs.encode(X), rtol=0, atol=1e-5)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    inside = load_sae(str(folder))
    assert torch.equal(codes(inside), codes(given))
    assert load_sae(str(folder), norm_scaling_factor=0.25).digest == inside.digest
    with pytest.raises(CheckpointError, match=r"norm_scaling_factor is 0\.5, but .*activation_scaler\.json says 0\.25"):
        load_sae(str(folder), norm_scaling_factor=0.5)


def test_saying_what_the_folder_says_changes_no_digest(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "sae", hook_name="blocks.1.hook_resid_post"))
    plain = load_sae(folder)
    assert load_sae(folder, normalize_activations="none").digest == plain.digest
    assert load_sae(folder, normalize_activations="layer_norm").digest != plain.digest
    assert load_sae(folder, normalize_activations="layer_norm").sae.transform == "layer_norm"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"norm_scaling_factor": 2.0},
            r"says normalize_activations none; say saes\[\]\.normalize_activations=expected",
        ),
        ({"normalize_activations": EXPECTED}, "a factor that it does not hold"),
        ({"normalize_activations": RESCALED, "norm_scaling_factor": 2.0}, "belongs to expected_average_only_in"),
        ({"normalize_activations": "batch"}, "is 'batch'; expected one of none, constant_norm_rescale"),
        ({"norm_scaling_factor": -1.0, "normalize_activations": EXPECTED}, r"is -1\.0; expected a number above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "sae", hook_name="blocks.1.hook_resid_post")
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(folder), **keys)


def test_other_formats_take_the_same_words(tmp_path: Path) -> None:
    path = str(sparsify(tmp_path / "s"))
    plain, given = load_sae(path), load_sae(path, normalize_activations=EXPECTED, norm_scaling_factor=0.5)
    x = normal(2, 3, plain.sae.width)
    first, second = plain.sae.encode(x), given.sae.encode(2 * x)
    torch.testing.assert_close(torch.from_numpy(second.value), torch.from_numpy(first.value))
    made = given.sae.reconstruct(2 * x, second)
    torch.testing.assert_close(made, 2 * plain.sae.reconstruct(x, first), rtol=1e-4, atol=1e-4)
    assert given.digest != plain.digest
    layer = str(qwen_scope(tmp_path / "q") / "layer12.sae.pt")
    assert load_sae(layer, normalize_activations="layer_norm").unit == CodeUnit("layer_norm")


def test_a_factor_that_lm_saes_keeps_elsewhere_is_asked_for(tmp_path: Path) -> None:
    name = f"dataset_average_activation_norm.{POINT}"
    whole = load_sae(str(llamascopium_of()(tmp_path / "whole")))
    factor = 7**0.5 / NORM
    assert whole.unit.activations == "scaled"
    assert whole.unit.scale == pytest.approx(factor)
    bare = str(corrupt(llamascopium_of(), **{name.replace(".", "__"): None})(tmp_path / "bare"))
    with pytest.raises(CheckpointError, match=r"give the factor as saes\[\]\.norm_scaling_factor"):
        load_sae(bare)
    given = load_sae(bare, norm_scaling_factor=factor)
    torch.testing.assert_close(given.sae.w_enc, whole.sae.w_enc)
    assert given.digest != load_sae(bare, norm_scaling_factor=2 * factor).digest
    with pytest.raises(CheckpointError, match=r"norm_scaling_factor is 2\.0, but .* says"):
        load_sae(str(tmp_path / "whole" / "L7R"), norm_scaling_factor=2.0)
    with pytest.raises(CheckpointError, match=r"which is saes.*expected_average_only_in; leave out"):
        load_sae(bare, normalize_activations="layer_norm")


UNITS = {
    "sparsify": "raw activations",
    "dictionary_learning": "raw activations, times the decoder row's length",
    "gemma_scope": "raw activations",
    "gemma_scope_2": "raw activations",
    "llama_scope": "raw activations, times the decoder row's length",
    "llamascopium": f"activations times {7**0.5 / NORM:.6g}",
    "qwen_scope": "raw activations",
}


@pytest.mark.parametrize("name", UNITS)
def test_every_format_says_the_unit_of_its_codes(name: str, tmp_path: Path) -> None:
    assert str(load_sae(str(WRITERS[name](tmp_path)), hook_point="blocks.12.hook_resid_post").unit) == UNITS[name]


@pytest.mark.parametrize("name", UNITS)
def test_where_a_unit_says_that_lengths_are_folded_in_the_decoder_rows_have_length_1(name: str, tmp_path: Path) -> None:
    loaded = load_sae(str(WRITERS[name](tmp_path)), hook_point="blocks.12.hook_resid_post")
    lengths = loaded.sae.decoder_norms()
    assert torch.allclose(lengths, torch.ones_like(lengths)) == loaded.unit.decoder_norm


def test_a_rescaled_topk_of_scaled_activations_is_in_raw_units_times_the_length(tmp_path: Path) -> None:
    keys = {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True, "normalize_activations": EXPECTED}
    folder = write(tmp_path / "sae", **keys, metadata={"hook_name": "blocks.1.hook_resid_post"})
    loaded = load_sae(str(folder), norm_scaling_factor=0.25)
    assert loaded.unit == CodeUnit("raw", 1.0, decoder_norm=True)
    assert torch.allclose(loaded.sae.decoder_norms(), torch.ones(F))


def test_a_mapping_may_hold_the_settings_of_an_sae(tmp_path: Path) -> None:
    write(tmp_path / "mistral_7b_layer_16", hook_point="blocks.16.hook_resid_pre")
    mapping = tmp_path / "saes.yaml"
    mapping.write_text("16/resid_pre: {path: mistral_7b_layer_16, normalize_activations: constant_norm_rescale}\n")
    (loaded,) = load_saes(saes_named(str(mapping))).values()
    assert loaded.sae.transform == RESCALED
    mapping.write_text("16: {resid_pre: {path: mistral_7b_layer_16, normalise: none}}\n")
    with pytest.raises(ConfigError, match="16/resid_pre has a key that is no key of saes"):
        saes_named(str(mapping))
