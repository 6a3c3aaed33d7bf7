"""Models as people run them: entered anywhere, with every kind of cache, compiled, wrapped, copied, in threads."""

import contextvars
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_hooks import TINY, num_hooks
from test_interpretable import IDS, MID, POST, PRE, D, F, dense, llama, logits, make_sae, on, read
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from pipeline.compute.edits import Edit
from pipeline.errors import ArgumentError
from pipeline.flows.interpretable import InterpretableModel
from pipeline.types import HookPoint

EDIT = {MID: Edit(feature=3, value=20, mode="set")}
HOW = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def wrap(inner: nn.Module) -> InterpretableModel:
    return InterpretableModel(inner, {PRE: make_sae(seed=1), MID: make_sae(seed=2, k=None), POST: make_sae(seed=3)})


@pytest.fixture
def model() -> InterpretableModel:
    return wrap(llama())


def codes_of(model: InterpretableModel, ids: Tensor) -> dict[str, Tensor]:
    """The slow twin: one forward over the whole text, without a cache."""
    with model.interpretation_enabled():
        model(ids, use_cache=False)
    return {name: codes.to_dense() for name, codes in model.get_active_features().items()}


def check_codes(model: InterpretableModel, found: dict[str, Tensor], ids: Tensor) -> None:
    expected = codes_of(model, ids)
    assert found.keys() == expected.keys()
    for name, codes in found.items():
        assert codes.shape == expected[name].shape, name
        torch.testing.assert_close(codes.to_dense(), expected[name], rtol=1e-3, atol=1e-3)


# where a caller enters


def through_the_base(inner: Any, ids: Tensor, cache: Any) -> Tensor:
    return inner.lm_head(inner.model(ids, **on(cache)).last_hidden_state)


def through_the_head(inner: Any, ids: Tensor, cache: Any) -> Tensor:
    result: Tensor = inner(ids, **on(cache)).logits
    return result


def by_forward_itself(inner: Any, ids: Tensor, cache: Any) -> Tensor:
    result: Tensor = inner.forward(ids, **on(cache)).logits
    return result


@pytest.mark.parametrize("enter", [through_the_head, through_the_base, by_forward_itself])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_is_followed_wherever_the_caller_enters(
    model: InterpretableModel, enter: Callable[..., Tensor], kind: str
) -> None:
    inner: Any = model.model
    cache = DynamicCache() if kind == "dynamic" else StaticCache(inner.config, max_cache_len=32)
    text = IDS
    with model.interpretation_enabled():
        step = text
        for _ in range(5):
            step = enter(inner, step, cache)[:, -1:].argmax(-1)
            text = torch.cat([text, step], dim=1)
        found = model.get_active_features()
    check_codes(model, found, text[:, :-1])


def test_layers_with_a_sliding_window_are_followed_beyond_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("mistral", **TINY, num_key_value_heads=1, sliding_window=4, initializer_range=0.3)
        model = wrap(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    for how in ({}, {"cache_implementation": "static"}):
        with model.interpretation_enabled():
            text = model.generate(IDS, **HOW, **how)
        check_codes(model, model.get_active_features(), text[:, :-1])


def test_a_cache_of_a_prompt_is_continued_in_several_ways_and_in_any_order(model: InterpretableModel) -> None:
    prompt, ends = IDS[:1, :4], (IDS[:1, 4:], IDS[1:, 1:3], IDS[1:, 5:])
    cache = DynamicCache()
    with model.interpretation_enabled():
        model(prompt, **on(cache))
        copies = [copy.deepcopy(cache) for _ in ends]
        for end, one in zip(ends, copies, strict=True):
            model(end[:, :1], **on(one))
        for end, one in reversed(list(zip(ends, copies, strict=True))):
            model(end[:, 1:], **on(one))
            found = model.get_active_features()
            with_outer = torch.cat([prompt, end], dim=1)
            expected = read(model.model, [HookPoint(1, "resid_pre")], with_outer)[HookPoint(1, "resid_pre")]
            torch.testing.assert_close(found[PRE].to_dense(), dense(model.saes[PRE], expected), rtol=1e-3, atol=1e-3)
        model(ends[1], **on(cache))
        assert model.get_active_features()[PRE].shape == (1, 6, F)


def test_what_a_cache_holds_from_before_the_block_is_not_part_of_the_codes(model: InterpretableModel) -> None:
    cache = DynamicCache()
    model(IDS[:, :3], **on(cache))
    with model.interpretation_enabled():
        model(IDS[:, 3:], **on(cache))
    whole = codes_of(model, IDS)
    for name, codes in list(model.get_active_features().items()):
        assert codes.shape == (2, 7, F), name
    with model.interpretation_enabled():
        model(IDS[:1, :5])
        other = DynamicCache()
        with model.steering_enabled({POST: (3, 1.0)}):
            pass
        model(IDS[:, :3], **on(other))
        model(IDS[:, 3:], **on(other))
        torch.testing.assert_close(model.get_active_features()[MID].to_dense(), whole[MID], rtol=1e-3, atol=1e-3)


def test_tokens_that_assisted_decoding_takes_back_are_not_tracked(model: InterpretableModel) -> None:
    ids = IDS[:1].repeat(1, 2)
    for length in (3, 5, 8):
        with model.interpretation_enabled():
            text = model.model.generate(ids, max_new_tokens=length, do_sample=False, prompt_lookup_num_tokens=3)
        check_codes(model, model.get_active_features(), text[:, :-1])


def test_several_rows_go_on_where_one_stopped_and_other_changes_of_rows_are_errors(model: InterpretableModel) -> None:
    cache = DynamicCache()
    with model.interpretation_enabled():
        model(IDS[:1, :4], **on(cache))
        cache.batch_repeat_interleave(3)
        model(IDS.flatten()[:3, None], **on(cache))
        text = torch.cat([IDS[:1, :4].repeat(3, 1), IDS.flatten()[:3, None]], dim=1)
        found = model.get_active_features()
        cache.batch_select_indices(torch.tensor([0, 2]))
        with pytest.raises(ArgumentError, match=r"a forward with 2 rows goes on where one with 3 stopped"):
            model(IDS[:, :1], **on(cache))
    check_codes(model, found, text)


def test_tokens_that_were_not_followed_leave_no_gap(model: InterpretableModel) -> None:
    cache = DynamicCache()
    with model.interpretation_enabled():
        model(IDS[:, :3], **on(cache))
        contextvars.Context().run(model, IDS[:, 3:5], **on(cache))  # outside of the block
        with pytest.raises(ArgumentError, match=r"goes on after 5 tokens, of which only 3 were followed"):
            model(IDS[:, 5:], **on(cache))


def test_a_cache_that_does_not_say_how_far_it_is_is_refused(model: InterpretableModel) -> None:
    block = model.model.model.layers[0]
    with (
        pytest.raises(ArgumentError, match="the layer_past of this forward is a tuple"),
        model.interpretation_enabled(),
    ):
        block(torch.zeros(1, 1, D), layer_past=(torch.zeros(1),))


# compiled models


def compiled(how: str, inner: nn.Module) -> nn.Module:
    if how == "torch.compile":
        return torch.compile(inner, backend="eager")  # type: ignore[return-value]
    part = inner if how == "model.compile" else inner.model.layers[1]
    part.compile(backend="eager")
    return inner


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "one block"])
def test_a_model_that_ran_compiled_is_tracked_and_steered_like_any_other(how: str) -> None:
    plain = wrap(llama())
    inner = compiled(how, llama())
    before = inner(IDS).logits
    model = wrap(inner)
    expected = codes_of(plain, IDS)
    for name, codes in codes_of(model, IDS).items():
        torch.testing.assert_close(codes, expected[name])
    with model.steering_enabled(EDIT), plain.steering_enabled(EDIT):
        torch.testing.assert_close(inner(IDS).logits, logits(plain))
        torch.testing.assert_close(logits(model), logits(plain))
    torch.testing.assert_close(inner(IDS).logits, before)
    assert not torch.allclose(before, model.steer(IDS, (MID, 3), 20, mode="set").logits)


def test_what_is_compiled_inside_a_block_does_not_keep_its_edits(model: InterpretableModel) -> None:
    plain = logits(model)
    with model.steering_enabled(EDIT):
        inner = torch.compile(model.model, backend="eager")
        steered = inner(IDS).logits
    assert not torch.allclose(steered, plain)
    torch.testing.assert_close(inner(IDS).logits, plain)


def test_compiled_decoding_with_a_static_cache_is_tracked_and_steered(model: InterpretableModel) -> None:
    compiling = CompileConfig(backend="eager", fullgraph=False)
    compiling._compile_all_devices = True
    how = HOW | {"cache_implementation": "static", "compile_config": compiling, "max_new_tokens": 4}
    plain = model.generate(IDS, **how)
    with model.steering_enabled(EDIT):
        expected = model.generate(IDS, **HOW, use_cache=False)[:, :11]
    with model.steering_enabled(EDIT), model.interpretation_enabled():
        text = model.generate(IDS, **how)
    assert torch.equal(text, expected)
    assert not torch.equal(text, plain)
    with model.steering_enabled(EDIT):
        check_codes(model, model.get_active_features(), text[:, :-1])
    assert torch.equal(model.generate(IDS, **how), plain)


def test_the_compiler_has_its_own_stance_again_after_the_last_block(model: InterpretableModel) -> None:
    def stance() -> str:
        return str(torch._dynamo.eval_frame._stance.stance)

    with model.interpretation_enabled():
        with model.steering_enabled(EDIT):
            pass
        assert stance() == "force_eager"
    assert stance() == "default"
    with pytest.raises(KeyboardInterrupt), model.interpretation_enabled():
        raise KeyboardInterrupt
    assert stance() == "default"


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_models_that_never_call_hooks_are_refused_by_name(model: InterpretableModel) -> None:
    plain = logits(model)
    inner: Any = model.model
    inner.model.forward = inner.model.forward  # as graphed callables set it: one graph in place of the modules
    replayed = inner.model(IDS)
    inner.model.forward = lambda *_, **__: replayed
    with (
        pytest.raises(ArgumentError, match=rf"a forward of LlamaModel did not pass {MID}, so nothing was"),
        model.steering_enabled(EDIT),
    ):
        model(IDS)
    del inner.model.forward
    assert torch.equal(logits(model), plain)
    assert num_hooks(model) == 0
    inner.model.layers[1].mlp = torch.jit.trace(inner.model.layers[1].mlp, torch.zeros(1, 2, D))
    with pytest.raises(ArgumentError, match=r"was compiled by torch\.jit"), model.interpretation_enabled():
        pass
