"""What discovery refuses, and by which field; numbers that are none; deadlines."""

import math
import shutil
from typing import Any

import pytest
from discovery_bench import TEXT, Bench, ask, bare, bench, catalog_bench, informed
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from sae_census.config import DiscoverRequest, SaeConfig
from sae_census.errors import DeadlineError, RequestError, ShardError
from sae_census.findings import Discovery
from sae_census.io.model.generation import Patience
from sae_census.steps.discovery.discoverer import Discoverer


@pytest.mark.parametrize(
    ("fields", "field", "unknown"),
    [
        ({"model_id": "another"}, "model_id", True),
        ({"sae_id": "another"}, "sae_id", True),
        ({"layers": [0, 7]}, "layers", False),
        ({"layers": [0], "sae_id": "late"}, "layers", False),
        ({"streams": ["mlp_out"]}, "streams", False),
        ({"restrict_features": [3, 96]}, "restrict_features", False),
        ({"sae_id": "early", "restrict_features": [64]}, "restrict_features", False),
        ({"normalize": "mean_code"}, "normalize", False),
    ],
)
def test_what_is_not_there_is_refused_by_its_field(fields, field, unknown, bare):
    with pytest.raises(RequestError) as caught:
        ask(bare, text="river", **fields)
    assert (caught.value.field, caught.value.unknown) == (field, unknown)
    many = bare.discover_many([DiscoverRequest(text="river", **fields), DiscoverRequest(text="river")])
    assert isinstance(many[0], RequestError)
    assert isinstance(many[1], Discovery)


def test_a_layer_without_an_sae_is_told_which_layers_have_one(bare):
    with pytest.raises(RequestError, match=r"layer 0 resid_post, layer 1 resid_post"):
        ask(bare, text="river", layers=[2])


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, ""), ({"text": "a", "prompt": "b"}, ""), ({"text": None, "prompt": None}, ""),
        ({"text": ""}, "text"), ({"text": 3}, "text"), ({"text": "\ud800"}, "text"),
        ({"text": "a", "model_id": "\ud800"}, "model_id"), ({"text": "a", "sae_id": "\ud800"}, "sae_id"),
        ({"text": "a", "min_coverage_pct": 50}, "min_coverage_pct"),
        ({"text": "a", "min_coverage_pct": math.nan}, "min_coverage_pct"),
        ({"text": "a", "min_coverage": 0.1, "min_coverage_pct": 0.1}, ""),
        ({"text": "a", "generate": "true"}, "generate"), ({"text": "a", "layers": "22"}, "layers"),
        ({"text": "a", "layers": []}, "layers"), ({"text": "a", "layers": [True]}, "layers.0"),
        ({"text": "a", "gen_tokens": 0}, "gen_tokens"), ({"text": "a", "gen_tokens": "9"}, "gen_tokens"),
        ({"text": "a", "score_mode": "sum"}, "score_mode"), ({"text": "a", "score_mode": ["mean"]}, "score_mode"),
        ({"text": "a", "restrict_features": [-1]}, "restrict_features.0"), ({"text": "a", "seed": -1}, "seed"),
        ({"text": "a", "tau": {"mode": "quantile"}}, "tau"), ({"text": "a", "tau": {"mode": "p50"}}, "tau.mode"),
        ({"text": "a", "tau": {"mode": "constant", "value": math.inf}}, "tau.value"),
        ({"text": "a", "temperature": math.nan}, "temperature"), ({"text": "a", "temperature": 0}, "temperature"),
        ({"prompt": "a", "do_sample": True, "temperature": 1e-300}, "temperature"),
        ({"prompt": "a", "temperature": 0.7}, ""), ({"prompt": "a", "top_p": 0.9}, ""),
        ({"text": "a", "tau": {"value": 3}}, "tau"), ({"text": "a", "tau": {"mode": "p95", "value": 0.0}}, "tau"),
        ({"text": "a", "tau": {"mode": "constant"}}, "tau"),
        ({"text": "a", "return_top_X": 3}, "return_top_X"),
        ({"text": "a", "topk_tokens_per_seq": 0}, "topk_tokens_per_seq"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_by_its_field(fields, where):
    with pytest.raises(ValidationError) as caught:
        DiscoverRequest.model_validate(fields)
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == where


def test_defaults_and_other_names():
    request = DiscoverRequest(prompt="a")
    assert request.model_dump(include={
        "generate", "gen_tokens", "topk_tokens_per_seq", "return_top_x", "score_mode", "min_coverage_pct",
        "merge_across_layers", "attach_examples", "attach_proto_labels", "seed", "restrict_features", "do_sample",
    }) == {
        "generate": True, "gen_tokens": 128, "topk_tokens_per_seq": 64, "return_top_x": 25,
        "score_mode": "mean×coverage", "min_coverage_pct": 0.5, "merge_across_layers": True,
        "attach_examples": True, "attach_proto_labels": True, "seed": 42, "restrict_features": [], "do_sample": False,
    }  # fmt: skip
    for name in ("mean*coverage", "mean_x_coverage", "mean×coverage"):
        assert DiscoverRequest(prompt="a", score_mode=name).score_mode == "mean×coverage"
    assert DiscoverRequest.model_validate({"prompt": "a", "min_coverage": 0.25}).min_coverage_pct == 0.25


def test_all_gated_and_missing_backgrounds_are_noted(bare, informed):
    answer = ask(bare, text="river water", tau={"mode": "constant", "value": 1e9})
    assert answer.features == []
    assert answer.analyzed.features_gated == answer.analyzed.features_scored > 0
    assert any("below min_coverage_pct=0.5" in note for note in answer.analyzed.notes)
    assert not any("needs a catalog" in note for note in answer.analyzed.notes)
    assert (ask(bare, text="a").analyzed.tau, ask(informed, text="a").analyzed.tau) == ("constant 0", "p95")
    assert any("needs a catalog" in note for note in ask(bare, text="a").analyzed.notes)
    one = {"return_top_x": 1, "min_coverage_pct": 0.0}
    (units,) = ask(informed, text="a river", **one).analyzed.notes
    assert "several units (activations after a layer norm, token by token; raw activations)" in units
    assert ask(informed, text="a river", merge_across_layers=False, **one).analyzed.notes == []
    assert ask(informed, text="a river", normalize="mean_code", **one).analyzed.notes == []
    assert [one.unit for one in ask(informed, text="a river").analyzed.saes] == [
        "activations after a layer norm, token by token",
        "raw activations",
    ]


def broken(bench: Bench, name: str) -> Discoverer:
    """With a weight that turned into NaN after it was loaded: files with such weights do not load."""
    discoverer = bench.open()
    discoverer._loaded.reader.model.inner.get_parameter(name).fill_(math.nan)
    return discoverer


@pytest.mark.parametrize("weight", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_numbers_that_are_none_end_one_request_and_not_its_neighbours(weight, bench):
    discoverer = broken(bench, weight)
    fields = {"text": TEXT, "topk_tokens_per_seq": 4}
    with pytest.raises(ShardError, match="dtype"):
        ask(discoverer, **fields)
    many = discoverer.discover_many([DiscoverRequest(**fields), DiscoverRequest(text="a", layers=[7])])
    assert isinstance(many[0], ShardError)
    assert isinstance(many[1], RequestError)


def test_an_infinite_code_is_an_error_and_never_an_answer(bench, sae_dirs, tmp_path):
    shutil.copytree(sae_dirs["late"], tmp_path / "sae")
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    weights["W_enc"] *= 3e38 / weights["W_enc"].abs().max()
    save_file(weights, tmp_path / "sae" / "sae_weights.safetensors")
    discoverer = Bench(model=bench.model, saes=(SaeConfig(path=str(tmp_path / "sae")),)).open()
    with pytest.raises(ShardError):
        ask(discoverer, text=TEXT, min_coverage_pct=0.0)


def test_a_deadline_ends_generation(bare):
    with pytest.raises(DeadlineError, match="not done in time"):
        bare.discover(DiscoverRequest(prompt="river", gen_tokens=32), Patience(until=0.0))


def test_generation_ends_with_the_token_at_which_nobody_waits_any_more(bare):
    patience, model, num_passes = Patience(until=math.inf), bare._loaded.reader.model.inner, 0

    def leave(*_: Any) -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 3:
            patience.gone.set()

    hook = model.register_forward_hook(leave)
    try:
        with pytest.raises(DeadlineError, match="nobody waits"):
            bare.discover(DiscoverRequest(prompt="river", gen_tokens=32), patience)
    finally:
        hook.remove()
    assert num_passes == 3
