"""Checkpoints on disk and on the hub: which file, which format, which k; what is damaged or runs code is refused."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    NAMES,
    WRITERS,
    K,
    corrupt,
    folder_of,
    gemma_scope,
    linear,
    normal,
    qwen_scope,
)

from sae_census.compute.numbers.sae import TopK
from sae_census.config import SaeConfig
from sae_census.errors import CheckpointError, ConfigError
from sae_census.flows.census.analyze import analyze
from sae_census.io.checkpoints import FORMATS, load_sae
from sae_census.steps.model.reader import load_saes


@pytest.mark.parametrize("hook_point", ["blocks.3.hook_resid_post", "model.layers.3"])
def test_a_layer_is_chosen_by_its_file_or_by_its_hook_point(hook_point, tmp_path):
    folder = qwen_scope(tmp_path, layers=(2, 3, 30))
    by_file, by_point = load_sae(str(folder / "layer3.sae.pt")), load_sae(str(folder), hook_point=hook_point)
    assert by_file.digest == by_point.digest != load_sae(str(folder / "layer30.sae.pt")).digest
    assert str(by_file.hook_point) == str(by_point.hook_point) == "blocks.3.hook_resid_post"
    torch.testing.assert_close(by_file.sae.b_dec, linear(7, 24, **NAMES, flipped=True)["b_dec"] + 3)
    saes = load_saes([SaeConfig(path=str(folder / f"layer{layer}.sae.pt")) for layer in (2, 3)])
    assert [str(key) for key in saes] == [f"blocks.{n}.hook_resid_post/{folder.name}" for n in (2, 3)]


def test_the_only_layer_of_a_folder_needs_no_choice(tmp_path):
    assert load_sae(str(qwen_scope(tmp_path))).hook_point.layer == 12


@pytest.mark.parametrize(
    ("hook_point", "message"),
    [
        (
            None,
            r"has files of several layers \(layer2\.sae\.pt, layer3\.sae\.pt\); give",
        ),
        (
            "blocks.4.hook_resid_post",
            r"has no file \(layer2\.sae\.pt, layer3\.sae\.pt\); give the path of layer<layer>",
        ),
        ("blocks.3.hook_resid_pre", r"has files of several layers"),
    ],
)
def test_a_folder_of_layers_without_a_choice_is_refused(hook_point, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_sae(str(qwen_scope(tmp_path, layers=(2, 3))), hook_point=hook_point)


def test_a_file_that_is_not_the_weights_of_its_folder_is_refused(tmp_path):
    folder = qwen_scope(tmp_path, layers=(2, 3))
    (folder / "optimizer.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"optimizer\.pt is not the weights file of its folder; expected layer<la"
    ):
        load_sae(str(folder / "optimizer.pt"))


def test_k_is_read_off_the_innermost_folder_that_names_it_or_given(tmp_path):
    named = qwen_scope(tmp_path / "L0_99", name="SAE-L0_4")
    bare = qwen_scope(tmp_path / "copies", name="sae")
    assert load_sae(str(named)).sae.gate == TopK(4, "identity")
    assert load_sae(str(named), k=4).sae.gate == TopK(4, "identity")
    assert load_sae(str(bare), k=5).sae.gate == TopK(5, "identity")
    assert load_sae(str(bare), k=5).digest != load_sae(str(bare), k=6).digest
    assert load_sae(str(bare), k=4).digest == load_sae(str(named)).digest
    (loaded,) = load_saes([SaeConfig(path=str(bare), k=5)]).values()
    assert loaded.sae.gate == TopK(5, "identity")
    with pytest.raises(CheckpointError, match=r"nothing says how many codes a token has; give saes\[\]\.k$"):
        load_sae(str(bare))
    with pytest.raises(CheckpointError, match=r"^saes\[\]\.k is 5, but the SAE in .* is a TopK of k = 4; leave k out$"):
        load_sae(str(named), k=5)
    with pytest.raises(CheckpointError, match=r"would keep 0 codes of a token; expected at least 1$"):
        load_sae(str(bare), k=0)


def test_layers_come_from_the_hub_by_file_or_by_hook_point(tmp_path, monkeypatch):
    repo, commit = f"SAE-Res-Qwen-W1K-L0_{K}", "0" * 40
    home = tmp_path / f"models--Qwen--{repo}"
    qwen_scope(home / "snapshots", name=commit, layers=(2, 3))
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    by_file = load_sae(f"Qwen/{repo}/layer3.sae.pt")
    by_point = load_sae(f"Qwen/{repo}", hook_point="blocks.3.hook_resid_post")
    assert by_file.digest == by_point.digest
    for loaded in (by_file, by_point):
        assert (loaded.name, str(loaded.hook_point)) == (repo, "blocks.3.hook_resid_post")
        assert loaded.sae.gate == TopK(K, "identity")


def test_only_the_chosen_layer_is_asked_of_the_hub(tmp_path, monkeypatch):
    folder, asked = qwen_scope(tmp_path, layers=(2, 3)), []

    def download(repo, **settings):
        asked.append(settings)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_sae("Qwen/repo/layer3.sae.pt")
    load_sae("Qwen/repo", hook_point="blocks.3.hook_resid_post")
    assert asked[0]["allow_patterns"] == ["layer3.sae.pt", "*.json"]
    assert asked[1]["allow_patterns"] == ["*"]
    assert {"*layer2.sae.pt", "*layer30.sae.pt"} < set(asked[1]["ignore_patterns"])
    assert "*layer3.sae.pt" not in asked[1]["ignore_patterns"]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def write_torch(file: Path, evil: Evil) -> None:
    torch.save({"W_enc": normal(2, 2), "b_enc": evil}, file)


def write_plain_pickle(file: Path, evil: Evil) -> None:
    file.write_bytes(pickle.dumps({"W_enc": evil}))


def write_numpy(file: Path, evil: Evil) -> None:
    np.savez(file, W_enc=np.array([evil], dtype=object))


@pytest.mark.parametrize(
    ("folder", "file", "write", "message"),
    [
        ("L0_4", "layer0.sae.pt", write_torch, "is not a plain torch file of tensors; pickles that hold code or obj"),
        ("L0_4", "layer0.sae.pt", write_plain_pickle, "is not a plain torch file of tensors; pickles that hold code"),
        ("g", "params.npz", write_numpy, r"are not a sound npz file of numbers \(pickled objects are never loaded\): "),
        ("g", "params.npz", write_plain_pickle, r"are not a sound npz file of numbers \(pickled objects are never"),
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(folder, file, write, message, tmp_path):
    target = tmp_path / "ran"
    path = folder_of(tmp_path, folder) / file
    write(path, Evil(target))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sae(str(path))
    assert "\n" not in str(caught.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(target)))  # the trap is a real one
    assert target.exists()


@pytest.mark.parametrize("damage", [b"", b"noise", bytes(range(256)) * 9, None])
@pytest.mark.parametrize("kind", ["torch", "npz"])
def test_damaged_weights_are_refused(kind, damage, tmp_path):
    folder = qwen_scope(tmp_path) if kind == "torch" else gemma_scope(tmp_path, "gemma")
    file = next(folder.iterdir())
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    message = r"is not a plain torch file of tensors|are not a sound (torch|npz) file"
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sae(str(folder))
    assert "\n" not in str(caught.value)


def test_parameters_and_half_precision_become_plain_float32(tmp_path):
    folder = qwen_scope(tmp_path)
    tensors = torch.load(folder / "layer12.sae.pt", weights_only=True)
    expected = load_sae(str(folder)).sae
    torch.save(
        {name: torch.nn.Parameter(value.bfloat16()) for name, value in tensors.items()}, folder / "layer12.sae.pt"
    )
    sae = load_sae(str(folder)).sae
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        assert not getattr(sae, name).requires_grad
        torch.testing.assert_close(getattr(sae, name), getattr(expected, name), rtol=1e-2, atol=0)


def test_what_is_no_tensor_in_a_file_of_tensors_is_left_out(tmp_path):
    for folder in (qwen_scope(tmp_path), gemma_scope(tmp_path, "gemma-scope-2b-pt-res/layer_1")):
        before, (file,) = load_sae(str(folder)), folder.iterdir()
        if file.suffix == ".npz":
            np.savez(file, **np.load(file), note=np.array("trained on Tuesday"))
        else:
            torch.save(torch.load(file, weights_only=True) | {"note": "trained on Tuesday", "steps": [1, 2]}, file)
        assert torch.equal(load_sae(str(folder)).sae.w_enc, before.sae.w_enc)


def test_a_torch_file_of_something_else_is_refused(tmp_path):
    folder = folder_of(tmp_path, "L0_4")
    torch.save([normal(2)], folder / "layer0.sae.pt")
    with pytest.raises(CheckpointError, match=r"layer0\.sae\.pt holds a list; expected a mapping of names to tensors$"):
        load_sae(str(folder))


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_is_of_one_format_only(name, tmp_path):
    folder = WRITERS[name](tmp_path)
    assert [known for known, reader in FORMATS.items() if reader.detect(folder)] == [name]
    assert load_sae(str(folder), format_name=name).digest == load_sae(str(folder)).digest
    assert not FORMATS[name].detect(folder_of(tmp_path, "empty"))


def test_a_folder_of_two_formats_needs_the_users_word(tmp_path):
    folder = qwen_scope(tmp_path)
    np.savez(folder / "params.npz")
    with pytest.raises(CheckpointError, match=r"may be gemma_scope or qwen_scope; say which with saes\[\]\.format$"):
        load_sae(str(folder))
    assert load_sae(str(folder), format_name="qwen_scope").sae.gate == TopK(K, "identity")


@pytest.mark.parametrize("name", WRITERS)
def test_a_k_that_contradicts_the_checkpoint_is_refused(name, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^saes\[\]\.k is 23, but the SAE in .* is a (TopK of k = \d|JumpRelu|Relu)"
    ):
        load_sae(str(WRITERS[name](tmp_path)), k=23)


def test_the_digest_of_every_format_changes_with_its_weights_and_config(tmp_path):
    for name, write in WRITERS.items():
        folder = write(tmp_path / name)
        first = load_sae(str(folder)).digest
        (folder / "README.md").touch()
        assert load_sae(str(folder)).digest == first
        for file in folder.rglob("*.json"):
            file.write_text(file.read_text() + "\n")
            assert load_sae(str(folder)).digest != first
    digests = {load_sae(str(qwen_scope(tmp_path, name=f"L0_{k}"))).digest for k in (4, 5)}
    changed = corrupt(qwen_scope, b_enc=torch.zeros(24))(tmp_path / "changed")
    assert len(digests | {load_sae(str(changed)).digest}) == 3


def test_an_unknown_hook_point_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"^hook point 'blocks\.1\.hook_q' is not known"):
        load_sae(str(tmp_path / "nowhere"), hook_point="blocks.1.hook_q")


def test_a_census_passes_over_negative_codes_and_says_so(tmp_path, analyze_config):
    folder = folder_of(tmp_path, "SAE-Res-tiny-L0_45")
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (60, 32), "W_dec": (32, 60), "b_enc": (60,), "b_dec": (32,)}
    weights = {name: 0.1 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights, folder / "layer1.sae.pt")
    said: list[str] = []
    config = analyze_config(
        tmp_path / "runs", saes=[{"path": str(folder / "layer1.sae.pt")}], preflight="warn", corpus={"max_tokens": 300}
    )
    done = analyze(config, said.append)
    fit = next(line for line in said if line.startswith("preflight blocks.1.hook_resid_post/SAE-Res-tiny-L0_45"))
    l0, negative, num_tokens = re.search(
        r"L0 ([\d.]+), (\d+) negative codes passed over, .*\((\d+) tokens\)", fit
    ).groups()
    assert float(l0) + int(negative) / int(num_tokens) == pytest.approx(45, abs=0.1)
    assert int(negative) > 0
    warning = (
        rf"warning: .*: {negative} of {45 * int(num_tokens)} codes are negative, as its gate has no ReLU; a feature"
    )
    assert any(re.match(warning, line) for line in said)
    features = done.catalog.features.to_pylist()
    assert all(row["count"] <= row["tokens_counted"] for row in features)
    assert sum(row["frequency"] for row in features) < 40
