"""Where edits act: every choice of positions against plain loops, over caches, padding and nested blocks."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_census.compute.census import masks
from sae_census.compute.effects.positions import Passing, Positions, Selector, read_positions
from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ArgumentError
from sae_census.flows.effects.interpretable import InterpretableModel
from sae_census.io.checkpoints import load_sae

POINT = "blocks.1.hook_resid_post"
TEXT = "river water. stone bridge"
FORCED: dict[str, Any] = {POINT: (9, 30.0, "set")}


@pytest.fixture(scope="module")
def sae(sae_dirs: dict[str, Any]) -> SparseAutoencoder:
    return load_sae(str(sae_dirs["late"])).sae


@pytest.fixture
def model(sinky_dir: Any, sae: SparseAutoencoder) -> InterpretableModel:
    return InterpretableModel(AutoModelForCausalLM.from_pretrained(sinky_dir).eval(), {POINT: sae})


@pytest.fixture(scope="module")
def ids(sinky_dir: Any) -> Tensor:
    found = PreTrainedTokenizerFast.from_pretrained(sinky_dir)(TEXT, return_tensors="pt")["input_ids"]
    assert found[0, 0] == 1
    assert isinstance(found, Tensor)
    return found


def activations(model: InterpretableModel, ids: Tensor, **kwargs: Any) -> Tensor:
    seen: list[Tensor] = []
    block = model.model.get_submodule("model.layers.1")
    with block.register_forward_hook(lambda _module, _args, output: seen.append(output.clone())), torch.no_grad():
        model(ids, **kwargs)
    return torch.cat(seen, dim=1)


def moved(model: InterpretableModel, ids: Tensor, positions: str | Positions, **kwargs: Any) -> list[list[bool]]:
    """Which tokens of a forward the edit changed."""
    before = activations(model, ids, **kwargs)
    with model.steering_enabled(FORCED, positions=positions):
        after = activations(model, ids, **kwargs)
    found: list[list[bool]] = (before != after).any(dim=2).tolist()
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.lists(st.integers(1, 3), max_size=4), st.integers(0, 3))
def test_a_token_is_judged_by_all_that_its_row_has_seen_so_far(
    seed: int, num_prompt: int, steps: list[int], num_padding: int
) -> None:
    rng = np.random.default_rng(seed)
    sizes, total = [num_prompt, *steps], num_prompt + sum(steps)
    norm = rng.choice([1.0, 2.5, 5.0, 30.0], (2, total))
    x = torch.zeros(2, total, 4)
    x[:, :, 0] = torch.from_numpy(norm)
    ids = torch.from_numpy(rng.integers(0, 5, (2, total)))
    real = np.ones((2, total), bool)
    real[0, : min(num_padding, num_prompt - 1)] = False
    chosen = Positions(which="counted", special_ids=(3,), first_positions=1, positions=(4,), max_norm_ratio=4.0)
    everywhere = {name: Selector(read_positions(name)) for name in ("all", "prompt", "generated", "1:3,6:")}
    selectors = {"counted": Selector(chosen), **everywhere}
    stop = 0
    books = dict.fromkeys(masks.RULES, 0)
    for size in sizes:
        start, stop = stop, stop + size
        mask = torch.from_numpy(real[:, :stop].astype(np.int64))
        for selector in selectors.values():
            selector.begin(Passing(past=start, ids=ids[:, start:stop], attention_mask=mask))
        got = {name: one.choose("here", x[:, start:stop]).where.tolist() for name, one in selectors.items()}
        for row in range(2):
            seen = [norm[row, i] for i in range(stop) if real[row, i]]
            median = sorted(seen)[(len(seen) - 1) // 2]
            for i in range(start, stop):
                place = int(real[row, : i + 1].sum()) - 1
                out_by = {
                    "padding": not real[row, i],
                    "special_tokens": ids[row, i] == 3,
                    "first_positions": place < 1,
                    "positions": place == 4,
                    "max_norm_ratio": norm[row, i] > 4 * median,
                    "attention_sinks": norm[row, i] > 2 * median,
                }
                rule = next((name for name in masks.RULES if out_by[name]), None)
                if rule:
                    books[rule] += 1
                assert got["counted"][row][i - start] is (rule is None)
                assert got["all"][row][i - start]
                is_prompt = place < real[row, :num_prompt].sum()
                assert got["prompt"][row][i - start] is bool(real[row, i] and is_prompt)
                assert got["generated"][row][i - start] is bool(real[row, i] and not is_prompt)
                assert got["1:3,6:"][row][i - start] is bool(real[row, i] and (place in (1, 2) or place >= 6))
    assert dict(selectors["counted"].left_out.get("here", {})) == {rule: n for rule, n in books.items() if n}


def test_edits_act_where_they_are_asked_to(model: InterpretableModel, ids: Tensor) -> None:
    num = ids.shape[1]
    x = activations(model, ids)
    sinks = masks.attention_sinks(*masks.sizes(x), np.ones((1, num), bool))[0]
    assert sinks.sum() == 1
    assert not sinks[0]
    assert moved(model, ids, "all") == [[True] * num]
    assert moved(model, ids, "counted") == [[i > 0 and not sinks[i] for i in range(num)]]
    left = model.get_left_out_positions()
    assert left == {POINT: {"special_tokens": 1, "attention_sinks": 1}}
    assert model.get_steered_positions()[POINT] == (num - 2, num)
    assert moved(model, ids, "3:5,7:") == [[i in (3, 4) or i >= 7 for i in range(num)]]
    assert moved(model, ids, Positions(which="counted", first_positions=2))[0][:3] == [False, False, True]


def test_left_padding_moves_no_position(model: InterpretableModel, ids: Tensor) -> None:
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1])[None] >= 4).long()
    for positions in ("counted", "prompt", "2:6"):
        plain, shifted = moved(model, ids, positions), moved(model, padded, positions, attention_mask=mask)
        assert shifted == [[False] * 4 + plain[0]]
    assert model.get_left_out_positions()[POINT]["padding"] == 4


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", ["prompt", "generated", "counted", "0:3,9:"])
def test_generation_from_a_cache_and_without_one_edits_the_same_tokens(
    model: InterpretableModel, ids: Tensor, positions: str, use_cache: bool
) -> None:
    num, new = ids.shape[1], 4
    came: list[Tensor] = []
    left: list[Tensor] = []
    block = model.model.get_submodule("model.layers.1")
    before = block.register_forward_hook(lambda _module, _args, output: came.append(output.clone()))
    with model.steering_enabled(FORCED, positions=positions):
        after = block.register_forward_hook(lambda _module, _args, output: left.append(output.clone()))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=use_cache, pad_token_id=0,
        )  # fmt: skip
    before.remove()
    after.remove()
    assert [len(x[0]) for x in left] == [num, 1, 1, 1] if use_cache else [num, num + 1, num + 2, num + 3]
    changed = [(a != b).any(dim=2)[0] for a, b in zip(came, left, strict=True)]
    found = (torch.cat(changed) if use_cache else changed[-1]).tolist()
    read = range(num + new - 1)
    sinks = masks.attention_sinks(*masks.sizes(came[0]), np.ones((1, num), bool))[0]
    expected = {
        "prompt": [i < num for i in read],
        "generated": [i >= num for i in read],
        "counted": [i > 0 and not (i < num and sinks[i]) for i in read],
        "0:3,9:": [i < 3 or i >= 9 for i in read],
    }[positions]
    assert found == expected


def test_nested_blocks_edit_each_where_it_is_asked_to(model: InterpretableModel, ids: Tensor) -> None:
    x = activations(model, ids)[0]
    sae = model.saes[POINT]
    with (
        model.steering_enabled({POINT: (9, 30.0, "set")}, positions="0:6"),
        model.steering_enabled({POINT: (9, 2.0)}, positions="4:"),
    ):
        got = activations(model, ids)[0]
        inner = model.get_steered_positions()[POINT]
    code = sae.codes_of(x, torch.tensor([9]))[:, 0]
    new = [30.0 if i < 4 else 60.0 if i < 6 else float(2 * code[i]) for i in range(len(x))]
    expected = x + (torch.tensor(new) - code)[:, None] * sae.w_dec[9]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert inner.seen == len(x)
    assert inner.touched <= len(x) - 4


def test_changing_a_sink_is_said_once(model: InterpretableModel, ids: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model.model(ids)
        with model.steering_enabled(FORCED, positions="counted"):
            model.model(ids)
        assert not caplog.records
        for _ in range(2):
            model.steer(ids, (POINT, 9), 30.0, mode="set")
    (record,) = caplog.records
    assert "changes an attention sink, the first at position" in record.getMessage()


def test_what_left_every_position_out_is_said(
    model: InterpretableModel, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), model.steering_enabled(FORCED, positions="generated"), torch.no_grad():
        model.model(ids)
    num = ids.shape[1]
    assert f"touched none of {num} positions: all were left out ({num} positions)" in caplog.text


@pytest.mark.parametrize("given", ["", "some", "3", "5:5", "5:2", "-1:3", "1:2,", ":4", 3, None])
def test_positions_that_mean_nothing_are_refused(model: InterpretableModel, given: Any) -> None:
    with pytest.raises(ArgumentError, match="positions"), model.steering_enabled(FORCED, positions=given):
        pass


def test_embeddings_without_ids_are_refused_where_special_tokens_are_left_out(model: InterpretableModel) -> None:
    x = torch.zeros(1, 3, WIDTH)
    counted = model.steering_enabled(FORCED, positions="counted")
    with pytest.raises(ArgumentError, match="embeddings instead of input_ids"), counted, torch.no_grad():
        model.model(inputs_embeds=x)
