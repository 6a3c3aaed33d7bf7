"""A model is what its files say, whole and finite, or it is refused; and who loads it proves that it is the one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hooks import LAYOUTS, TINY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sae_census.errors import CheckpointError, ConfigError
from sae_census.io.checkpoints import load_sae
from sae_census.io.loading.pretrained import resolve
from sae_census.io.model.language_model import LanguageModel

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A random model of one family."""
    config = AutoConfig.for_model(family.split()[0], **TINY, **LAYOUTS[family].config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def load(folder: Path) -> LanguageModel:
    return LanguageModel(str(folder), dtype=torch.float32, device=CPU)


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the tensors of a directory."""
    file = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    file.unlink()
    save_file(change(tensors), file, metadata={"format": "pt"})
    return folder


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not any(part in key for part in parts)}


def same(ours: LanguageModel, model: PreTrainedModel) -> None:
    ids = torch.arange(8)[None] % TINY["vocab_size"] + 0
    with torch.no_grad():
        expected = model.eval().base_model(ids).last_hidden_state
        assert torch.equal(ours.inner.base_model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("family", LAYOUTS)
def test_whole_headless_sharded_and_pickled_directories_of_every_family_load(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "headless")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    shutil.copytree(tmp_path / "whole", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(load_file(tmp_path / "whole" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for kind in ("whole", "headless", "sharded", "pickled"):
        found = load(tmp_path / kind)
        same(found, model)
        assert found.is_headless == (kind == "headless" and not model.config.tie_word_embeddings)


@pytest.mark.parametrize("family", LAYOUTS)
def test_missing_renamed_and_resized_tensors_of_every_family_are_refused_by_name(family: str, tmp_path: Path) -> None:
    tiny(family).save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    victim = next(key for key in sorted(tensors) if ".1." in key and tensors[key].ndim == 2 and "experts" not in key)

    def changed(name: str, change: Callable[[Tensors], Tensors]) -> str:
        folder = rewrite(Path(shutil.copytree(tmp_path / "whole", tmp_path / name)), change)
        with pytest.raises(CheckpointError, match=r"are not those that its config\.json describes") as error:
            load(folder)
        return str(error.value)

    assert f"1 missing: {victim}; is the directory whole" in changed("one", without(victim))
    told = changed("wrapped", lambda found: {f"module.{key}": value for key, value in found.items()})
    assert "begin with 'module.', which a wrapper adds" in told
    told = changed("half", lambda found: {("_orig_mod." if ".1." in k else "") + k: v for k, v in found.items()})
    assert "begin with '_orig_mod.', which a wrapper adds" in told
    told = changed("small", lambda found: found | {victim: torch.zeros(3, 3)})
    assert f"1 of another size: {victim} (3x3 in the file, " in told


def test_an_expert_that_is_missing_or_of_another_size_is_refused(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path / "whole")
    one = "model.layers.0.mlp.experts.1.down_proj.weight"
    for name, change in (("missing", without(one)), ("small", lambda found: found | {one: torch.zeros(3, 3)})):
        folder = rewrite(Path(shutil.copytree(tmp_path / "whole", tmp_path / name)), change)
        with pytest.raises(CheckpointError, match=r"experts\.(\*\.)?down_proj"):
            load(folder)


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.1.self_attn.q_proj.bias",  # the config says that there is none
        "model.layers.0.self_attn.q_norm.weight",  # another family
        "model.layers.2.mlp.up_proj.weight",  # more layers than the config has
        "model.layers.0.self_attn.q_proj.lora_A.weight",  # an adapter that was not merged
        "model.embed_norm.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_of_a_part_that_the_model_has_is_refused_if_the_model_does_not_know_it(
    extra: str, tmp_path: Path
) -> None:
    tiny("llama", attention_bias=False, mlp_bias=False).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda found: found | {extra: torch.ones(4)})
    with pytest.raises(CheckpointError, match=rf"1 not known: {extra}; is the directory whole, and is its config"):
        load(tmp_path)


def test_harmless_leftovers_load_and_those_of_other_parts_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama", attention_bias=False, mlp_bias=False)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda found: found | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    same(load(tmp_path), model)
    assert capsys.readouterr().err == ""
    rewrite(tmp_path, lambda found: found | {"v_head.summary.weight": torch.ones(4), "vision_tower.x": torch.ones(2)})
    same(load(tmp_path), model)
    told = capsys.readouterr().err
    assert told.startswith("warning: 2 tensors of model")
    assert "v_head.summary.weight, vision_tower.x" in told


def test_the_head_of_a_headless_directory_is_an_error_when_it_is_asked_for_and_never_noise(tmp_path: Path) -> None:
    tiny("phi").base_model.save_pretrained(tmp_path / "none")
    model = load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="was saved without its head, so it predicts no token"):
        model.inner(torch.tensor([[1, 2]]))
    with pytest.raises(CheckpointError, match="was saved without its head"):
        model.inner.get_output_embeddings().weight  # noqa: B018
    tiny("phi").save_pretrained(tmp_path / "half")
    rewrite(tmp_path / "half", without("lm_head.bias"))
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.bias"):
        load(tmp_path / "half")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)

    def spoil(found: Tensors) -> Tensors:
        found["transformer.h.1.mlp.c_fc.weight"][3, 2] = value
        return found

    rewrite(tmp_path, spoil)
    with pytest.raises(CheckpointError, match=r"1 tensors of model .* hold NaN or infinite values: .*h\.1\.mlp\.c_fc"):
        load(tmp_path)


def test_weights_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda found: found | {"transformer.ln_f.bias": torch.full((16,), 3e38)})
    load(tmp_path)


def test_a_token_beyond_the_embedding_is_one_line_with_both_sizes(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))
    rewrite(tmp_path, lambda found: found | {k: found[k][:290] for k in found if "embed" in k or "lm_head" in k})
    model = load(tmp_path)
    model.check_ids(torch.tensor([[289]]))
    message = (
        r"^token 291 \(.+\) is beyond the model's embedding: the tokenizer has 300 tokens, the embedding 290 rows; "
    )
    with pytest.raises(ConfigError, match=message), model.captures([]) as captures:
        model.run(captures, torch.tensor([[5, 291]]))


def test_a_revision_is_refused_where_nothing_has_one(model_dir: Path, sae_dirs: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.revision is 'main', but .* has no revisions; leave it out"):
        resolve(str(model_dir), "main")
    with pytest.raises(CheckpointError, match=r"saes\[\]\.revision is 'main', but .* has no revisions; leave it out"):
        load_sae(str(sae_dirs["late"]), revision="main")
