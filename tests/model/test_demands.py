"""What SAEs were trained with and a run lacks is said, with what to set; what surely changes numbers is an error."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_census.compute.numbers.sae import Relu, SparseAutoencoder
from sae_census.config import AnalyzeConfig
from sae_census.errors import CheckpointError
from sae_census.flows.census.analyze import analyze
from sae_census.io.checkpoints import LoadedSae
from sae_census.steps.census import preflight
from sae_census.steps.model.demands import Run, demands
from sae_census.types import HookPoint, SiteKey, Stream

MakeConfig = Callable[..., AnalyzeConfig]
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


def loaded(name: str = "one", stream: Stream = "resid_pre", **metadata: Any) -> tuple[SiteKey, LoadedSae]:
    sae = SparseAutoencoder(
        w_enc=torch.eye(4), b_enc=torch.zeros(4), w_dec=torch.eye(4), b_dec=torch.zeros(4), gate=Relu()
    )
    point = HookPoint(8, stream)
    one = LoadedSae(name=name, hook_point=point, sae=sae, digest="", metadata=metadata)
    return SiteKey(point, name), one


def run(**changes: Any) -> Run:
    given: dict[str, Any] = {
        "model_id": "openai-community/gpt2",
        "family": "gpt2",
        "dtype": "bfloat16",
        "is_centred": False,
        "bos": True,
        "context_length": 128,
        "sources": ("Skylion007/openwebtext",),
        "special_ids": frozenset({0, 50256}),
        "special_tokens": True,
        "first_positions": 0,
        "positions": (),
    }
    return Run(**given | changes)


BOOKS = {"counted": 600, "attention_sinks": 0}


def said(metadata: dict[str, Any], stream: Stream = "resid_pre", **changes: Any) -> list[tuple[str, bool]]:
    found = demands(dict([loaded(stream=stream, **metadata)]), run(**changes))
    return [(one.text.removeprefix(f"{loaded(stream=stream)[0]}: "), one.is_error) for one in found]


MET: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"prepend_bos": True, "context_size": 128, "dataset_path": "Skylion007/openwebtext"}, {}),
    ({"model_name": "gpt2-small"}, {}),
    ({"model_name": "gpt2-small"}, {"model_id": "/models/mine"}),
    ({"model_name": "anything/else"}, {"model_id": "/models/mine", "family": "llama"}),
    ({"seqpos_slice": [None], "exclude_special_tokens": False}, {}),
    ({"seqpos_slice": [1, None]}, {}),  # the one position left out is BOS
    ({"seqpos_slice": [1, None]}, {"bos": False, "first_positions": 1}),
    ({"seqpos_slice": [0, 64], "context_size": 128}, {"positions": tuple(range(64, 128))}),
    ({"exclude_special_tokens": [0, 50256]}, {}),
    (CENTRED, {"is_centred": True}),
    (CENTRED, {"family": "llama"}),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": False}}, {}),
    ({"dtype": "bfloat16"}, {"dtype": "float32"}),
    ({"dtype": "torch.float32"}, {"dtype": "float32"}),
]


@pytest.mark.parametrize(("metadata", "changes"), MET)
def test_a_run_that_gives_what_was_trained_with_hears_nothing(
    metadata: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert said(metadata, **changes) == []


LACKING: list[tuple[dict[str, Any], dict[str, Any], str, bool]] = [
    (CENTRED, {}, "model.center_writing_weights=true would match", True),
    (
        {"model_from_pretrained_kwargs": {"center_writing_weights": False}},
        {"is_centred": True},
        "model.center_writing_weights=false would match",
        True,
    ),
    ({"looks_like_centred_release": "gpt2-small-res-jb"}, {}, "looks like the release gpt2-small-res-jb", False),
    ({"prepend_bos": False}, {}, "without BOS, but this corpus has one; corpus.bos=never would match", True),
    ({"prepend_bos": True}, {"bos": False}, "with BOS, but this corpus has none; corpus.bos=always", True),
    ({"seqpos_slice": [5, None]}, {}, "positions 5: of a context alone", True),
    ({"seqpos_slice": [5, None]}, {}, "but 4 others are counted; masks.first_positions=5 would match", True),
    ({"seqpos_slice": [1, None]}, {"special_tokens": False}, "masks.first_positions=1 would match", True),
    ({"seqpos_slice": [2, -2], "context_size": 128}, {}, "masks.positions=[0,1,126,127] would match", True),
    ({"seqpos_slice": [0, 20]}, {}, "masks.positions with all 108 positions outside that slice would match", True),
    ({"exclude_special_tokens": True}, {"special_tokens": False}, "masks.special_tokens=true would match", True),
    ({"exclude_special_tokens": [0, 11]}, {}, "without the tokens 11 (exclude_special_tokens)", False),
    ({"context_size": 1024}, {}, "but these have 128; corpus.context_length=1024 would match", False),
    ({"dataset_path": "monology/pile"}, {}, "corpus.source=monology/pile would match", False),
    ({"dtype": "float32"}, {}, "the model computes in bfloat16; model.dtype=float32 would match", False),
    ({"model_name": "gemma-2-2b"}, {}, "trained on gemma-2-2b, but this model is of the family gpt2", True),
    ({"model_name": "gpt2-xl"}, {}, "trained on gpt2-xl, but model.id is openai-community/gpt2", False),
]


@pytest.mark.parametrize(("metadata", "changes", "text", "is_error"), LACKING)
def test_what_a_run_lacks_is_one_sentence_with_what_to_set(
    metadata: dict[str, Any], changes: dict[str, Any], text: str, is_error: bool
) -> None:
    ((found, error),) = said(metadata, **changes)
    assert text in found
    assert error == is_error


def test_an_analysis_says_what_its_sae_was_trained_with_and_refuses_when_asked(
    analyze_config: MakeConfig, sae_dirs: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sae_dirs["late"], tmp_path / "late")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"seqpos_slice": [3, None], "context_size": 16, "dataset_path": "some/texts"}
    (folder / "cfg.json").write_text(json.dumps(config))
    said: list[str] = []
    given: dict[str, Any] = {"saes": [{"path": str(folder)}], "corpus": {"max_tokens": 300}}
    found = analyze(analyze_config(tmp_path / "runs", preflight="warn", **given), said.append).catalog
    warnings = [line for line in said if line.startswith("warning: ")]
    assert any("masks.first_positions=3 would match" in line for line in warnings)
    assert any("trained on some/texts; corpus.source=some/texts would match" in line for line in warnings)
    assert found.units == {"blocks.1.hook_resid_post/late": "raw activations"}
    with pytest.raises(CheckpointError, match=r"masks\.first_positions=3") as refused:
        analyze(analyze_config(tmp_path / "others", preflight="refuse", **given), said.append)
    assert "some/texts" not in str(refused.value)


@pytest.mark.parametrize("stream", ["attn_z", "mlp_post", "mlp_in"])
def test_streams_that_centring_does_not_change_ask_for_none(stream: Stream) -> None:
    assert said(CENTRED, stream) == []


def test_saes_of_which_the_same_is_to_be_said_stand_together() -> None:
    saes = dict([loaded("one", context_size=64), loaded("two", context_size=64), loaded("three", prepend_bos=False)])
    texts = [one.text for one in demands(saes, run())]
    assert texts[0].startswith("blocks.8.hook_resid_pre/one, blocks.8.hook_resid_pre/two: trained on contexts of 64")
    assert texts[1].startswith("blocks.8.hook_resid_pre/three: trained without BOS")
    assert len(texts) == 2


def test_only_what_changes_numbers_is_refused() -> None:
    mild = demands(dict([loaded(context_size=64)]), run())
    preflight.refuse(mild)
    with pytest.raises(CheckpointError, match=r"corpus\.bos=never would match \(preflight=warn goes on regardless\)$"):
        preflight.refuse(mild + demands(dict([loaded(prepend_bos=False)]), run()))


def test_a_poor_fit_is_told_under_which_setting_it_would_be_a_good_one() -> None:
    """An SAE of tokens brought to length sqrt(D) passes over what is below 0.2; these tokens are all that short."""
    generator, both = torch.Generator().manual_seed(0), torch.cat([torch.eye(16), -torch.eye(16)])
    sae = SparseAutoencoder(
        w_enc=both.T.contiguous(), b_enc=torch.full((32,), -0.2), w_dec=both, b_dec=torch.zeros(16), gate=Relu()
    )
    x = torch.randn(600, 16, generator=generator) * 0.03 * torch.rand(600, 1, generator=generator)
    site, one = loaded()
    others = preflight._others(site, sae, x)
    fit = preflight._fit(site, x, 0 * x, num_codes=0, num_negative=0, dead_share=1.0, others=others, tokens=BOOKS)
    (found,) = [c for c in preflight.complaints([fit], {site: one}, run()) if "fit is" in c.text]
    assert re.search(
        r"with saes\[\]\.normalize_activations=constant_norm_rescale the FVU of 512 tokens is 0\.", found.text
    )
    assert preflight._others(site, sae, x[:0]) == ()


def test_activations_that_fit_better_without_their_mean_are_told() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(
        w_enc=torch.cat([torch.eye(16), -torch.eye(16)], dim=1) - 1 / 16 * torch.ones(1, 32),
        b_enc=torch.zeros(32),
        w_dec=torch.cat([torch.eye(16), -torch.eye(16)]),
        b_dec=torch.zeros(16),
        gate=Relu(),
    )
    x = torch.randn(600, 16, generator=generator) + 3 * torch.randn(600, 1, generator=generator)
    site, one = loaded()
    fit = preflight._fit(
        site, x, x, num_codes=0, num_negative=0, dead_share=1.0, others=preflight._others(site, sae, x), tokens=BOOKS
    )
    (found,) = preflight.complaints([fit], {site: one}, run())
    assert "if it was trained on centred writing weights, model.center_writing_weights=true would match" in found.text
    assert not found.is_error
    assert preflight.complaints([fit], {site: one}, run(family="llama")) == []
    said = dict([loaded(model_from_pretrained_kwargs={"center_writing_weights": False})])
    assert preflight.complaints([fit], said, run()) == []
