"""All SAEs of a directory: of every format, at any depth, one for each hook point."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import WRITERS, llamascopium_of, qwen_scope

from sae_census.errors import CheckpointError
from sae_census.io.checkpoints import FORMATS, load_sae
from sae_census.io.checkpoints.directory import load_saes


def test_the_writers_below_and_two_others_are_all_formats() -> None:
    assert {*WRITERS, "sae_lens", "nanochat", "neel"} == {*FORMATS}


@pytest.mark.parametrize("name", WRITERS)
def test_one_checkpoint_of_any_format_is_a_directory_of_one(name: str, tmp_path: Path) -> None:
    folder = WRITERS[name](tmp_path)
    loaded = load_sae(str(folder))
    for given in (tmp_path, folder):
        ((hook_point, sae),) = load_saes(given).items()
        assert hook_point == str(loaded.hook_point)
        assert type(sae.gate) is type(loaded.sae.gate)
        for part in ("w_enc", "b_enc", "w_dec", "b_dec"):
            assert torch.equal(getattr(sae, part), getattr(loaded.sae, part)), part
        assert load_saes(given, "cpu", [hook_point]).keys() == {hook_point}
        assert load_saes(given, hook_points=["blocks.99.hook_mlp_out"]) == {}


def test_saes_of_many_formats_and_layers_in_one_directory_come_sorted_by_hook_point(
    sae_dirs: dict[str, Path], tmp_path: Path
) -> None:
    qwen_scope(tmp_path / "a", layers=(2, 12))
    llamascopium_of()(tmp_path / "b")
    shutil.copytree(sae_dirs["late"], tmp_path / "c" / "late")
    layers = (1, 12, 2, 7)
    assert list(load_saes(tmp_path)) == [f"blocks.{layer}.hook_resid_post" for layer in layers]


def test_two_checkpoints_for_one_hook_point_are_refused_by_name(sae_dirs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(sae_dirs["late"], tmp_path / name)
    with pytest.raises(CheckpointError, match=r"first/.* and .*second/.* are both for blocks\.1\.hook_resid_post; "):
        load_saes(tmp_path)


def test_an_unsound_checkpoint_is_skipped_aloud_and_refused_where_it_is_alone(
    sae_dirs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(sae_dirs["early"], tmp_path / "early")
    (tmp_path / "early/cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_saes(tmp_path)
    shutil.copytree(sae_dirs["late"], tmp_path / "late")
    assert list(load_saes(tmp_path)) == ["blocks.1.hook_resid_post"]
    assert "skipping a file that is not sound: the config in" in caplog.text
