"""A model with SAEs attached: outside it is the model; inside, codes are followed and edited, and nothing is left."""

import gc
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_hooks import LAYOUTS, NUM_LAYERS, TINY, Tiny, build, num_hooks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from sae_census.compute.effects.edits import Edit
from sae_census.compute.numbers.sae import JumpRelu, SparseAutoencoder, TopK
from sae_census.errors import ArgumentError
from sae_census.flows.effects.interpretable import InterpretableModel
from sae_census.io.model.hooks import Captures, layout_of
from sae_census.io.model.interventions import Interventions
from sae_census.types import HookPoint

D, F = int(TINY["hidden_size"]), 40
PRE, MID, POST = (f"blocks.1.hook_resid_{where}" for where in ("pre", "mid", "post"))
IDS = torch.arange(14).view(2, 7) % 11 + 3
CACHE_NAMES = ["past_key_values"] + ["cache"] * ("cache" in inspect.signature(LlamaForCausalLM.forward).parameters)
"""Of the argument of a forward: its older name, and its newer one where this release of transformers knows it."""


def make_sae(width: int = D, *, seed: int = 0, k: int | None = 6) -> SparseAutoencoder:
    """A top-k SAE on normalised input; with k=None one that judges each feature by itself, on the raw input."""
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(F, width, generator=generator), dim=1)
    threshold = torch.rand(F, generator=generator)
    return SparseAutoencoder(
        w_enc=w_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(F, generator=generator),
        w_dec=w_dec,
        b_dec=torch.zeros(width),
        gate=JumpRelu(threshold) if k is None else TopK(k),
        transform="none" if k is None else "layer_norm",
    )


def llama(**changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **TINY, initializer_range=0.3, tie_word_embeddings=False, **changes)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture
def model() -> InterpretableModel:
    return InterpretableModel(llama(), {PRE: make_sae(seed=1), MID: make_sae(seed=2, k=None), POST: make_sae(seed=3)})


def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    output: Tensor = model(ids, **kwargs).logits
    return output


def strongest(model: InterpretableModel, hook_point: str, ids: Tensor = IDS) -> int:
    """A feature that fires on some token."""
    with model.interpretation_enabled():
        model(ids)
    return int(model.get_active_features(hook_point)[hook_point].coalesce().indices()[2].mode().values)


def read(model: nn.Module, points: list[HookPoint], ids: Tensor = IDS) -> dict[HookPoint, Tensor]:
    blocks, taps = layout_of(model)
    with Captures(blocks, taps, points) as captures:
        return captures.run(getattr(model, "base_model", model), ids)


def dense(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    codes = sae.encode(x)
    z = torch.zeros(*x.shape[:2], sae.num_features)
    z[codes.row.tolist(), codes.position.tolist(), codes.feature.tolist()] = torch.from_numpy(codes.value)
    return z


# every family


@pytest.fixture(scope="module", params=LAYOUTS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return build(request.param)


def attach(tiny: Tiny) -> InterpretableModel:
    widths = {point: value.shape[-1] for point, value in tiny.capture(tiny.points(), IDS).items()}
    saes = {str(point): make_sae(width, seed=i, k=6) for i, (point, width) in enumerate(widths.items())}
    return InterpretableModel(tiny.model, saes)


def test_codes_are_those_of_the_tensor_at_each_hook_point(tiny: Tiny) -> None:
    model, got = attach(tiny), tiny.capture(tiny.points(), IDS)
    with model.interpretation_enabled():
        model(IDS)
    found = model.get_active_features()
    assert set(found) == {str(point) for point in tiny.points()}
    for point, x in got.items():
        assert torch.equal(found[str(point)].to_dense(), dense(model.saes[str(point)], x)), point


def test_the_residual_stream_before_between_and_after_are_different_tensors(tiny: Tiny) -> None:
    streams = [stream for stream in ("resid_pre", "resid_mid", "resid_post") if stream in tiny.taps]
    sae = make_sae()
    model = InterpretableModel(tiny.model, {f"blocks.0.hook_{stream}": sae for stream in streams})
    with model.interpretation_enabled():
        model(IDS)
    first, *others = [codes.to_dense() for codes in model.get_active_features().values()]
    assert len(others) == (1 if tiny.layout.parallel else 2)
    for other in others:
        assert not torch.allclose(first, other, atol=0.1)


def test_edits_that_change_no_code_change_no_bit_and_others_do(tiny: Tiny) -> None:
    model = attach(tiny)
    plain = tiny.model(IDS).last_hidden_state
    for name in [name for name in model.saes if name.startswith("blocks.1")]:
        feature = strongest(model, name)
        for strength, mode in ((1.0, "scale"), (0.0, "add")):
            assert torch.equal(model.steer(IDS, (name, feature), strength, mode=mode).last_hidden_state, plain), name
        assert not torch.equal(model.steer(IDS, (name, feature), 0.0).last_hidden_state, plain), name
        assert model.get_steered_positions()[name].touched > 0
    assert torch.equal(tiny.model(IDS).last_hidden_state, plain)
    assert num_hooks(tiny.model) == 0


def test_a_write_at_the_middle_of_a_block_reaches_the_stream_around_the_second_norm(tiny: Tiny) -> None:
    """The same vector added to what attention writes, or to the stream after it, is the same intervention."""
    v = torch.linspace(-1, 1, D)

    def with_added(*streams: str) -> Tensor:
        functions = {HookPoint(0, stream): lambda x: x + v for stream in streams}
        with Interventions(tiny.blocks, tiny.taps, functions):
            result: Tensor = tiny.model(IDS).last_hidden_state
        return result

    if "attn_out" not in tiny.taps:  # linear attention has none
        return
    plain = tiny.model(IDS).last_hidden_state
    after_attention = with_added("attn_out")
    assert not torch.allclose(after_attention, plain, atol=1e-2)
    same = ("resid_post", "mlp_out") if tiny.layout.parallel else ("resid_mid",)
    for stream in same:
        torch.testing.assert_close(with_added(stream), after_attention, rtol=1e-4, atol=1e-4)
    if not tiny.layout.parallel:
        torch.testing.assert_close(with_added("mlp_out"), with_added("resid_post"), rtol=1e-4, atol=1e-4)


def test_a_write_reaches_the_module_that_reads_there(tiny: Tiny) -> None:
    for stream, read_by, written, norm in (
        ("attn_z", tiny.layout.to_out, "attn_out", tiny.layout.norm_of_attn),
        ("mlp_in", "mlp", "mlp_out", tiny.layout.norm_of_mlp),
        ("mlp_post", f"mlp.{tiny.layout.down}", "mlp_out", tiny.layout.norm_of_mlp),
    ):
        if not {stream, written} <= tiny.taps.keys():  # mixtures of experts and linear attention lack some
            continue
        point = HookPoint(0, stream)
        x = tiny.capture([point], IDS)[point]
        with Interventions(tiny.blocks, tiny.taps, {point: lambda x: 1.5 * x + 0.1}):
            got = tiny.capture([HookPoint(0, written)], IDS)[HookPoint(0, written)]
        expected = tiny.through(0, norm, tiny.through(0, read_by, 1.5 * x + 0.1))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_end_of_a_block_and_the_start_of_the_next_are_one_place_to_steer(tiny: Tiny) -> None:
    saes = {f"blocks.{layer}.hook_resid_{where}": make_sae() for layer, where in ((0, "post"), (1, "pre"))}
    model = InterpretableModel(tiny.model, saes)
    ends = [model.steer(IDS, (name, 3), 5.0, mode="set").last_hidden_state for name in saes]
    assert torch.equal(*ends)


# inside and outside


def test_steering_moves_along_the_decoder_row_and_keeps_everything_else(model: InterpretableModel) -> None:
    point, feature = HookPoint(1, "resid_mid"), strongest(model, MID)
    sae, x = model.saes[MID], read(model.model, [HookPoint(1, "resid_mid")])[point]
    z = dense(sae, x)[:, :, feature]
    with model.steering_enabled({MID: (feature, -1.0)}):
        steered = read(model.model, [point])[point]
    expected = x - 2 * z[:, :, None] * sae.w_dec[feature]
    torch.testing.assert_close(steered, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(steered[z == 0], x[z == 0])
    blocks, _ = layout_of(model.model)
    with model.steering_enabled({MID: (feature, -1.0)}):
        after = read(model.model, [HookPoint(1, "resid_post")])[HookPoint(1, "resid_post")]
    expected = expected + blocks[1].mlp(blocks[1].post_attention_layernorm(expected))
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_outside_any_context_the_wrapper_is_the_model(model: InterpretableModel) -> None:
    plain = logits(model.model)
    with model.interpretation_enabled():
        assert torch.equal(logits(model), plain)
    with model.steering_enabled({POST: (3, 7.0)}):
        pass
    assert torch.equal(logits(model), plain)
    assert num_hooks(model) == 0


def test_tracking_survives_the_end_of_an_inner_steering(model: InterpretableModel) -> None:
    with model.interpretation_enabled():
        with model.steering_enabled({POST: Edit(feature=3, value=9, mode="set")}):
            model(IDS)
        model(IDS[:, :4])
    assert model.get_active_features(POST)[POST].shape == (2, 4, F)
    with model.steering_enabled({POST: Edit(feature=3, value=9, mode="set")}):
        with model.interpretation_enabled():
            inside = logits(model)
        assert torch.equal(logits(model), inside)
    assert not torch.equal(logits(model), inside)
    assert num_hooks(model) == 0


def test_inner_and_outer_steering_both_act_as_one_list_of_edits(model: InterpretableModel) -> None:
    one, two, three = (
        Edit(feature=3, value=4, mode="set"),
        Edit(feature=3, value=2),
        Edit(feature=5, value=1, mode="add"),
    )
    with model.steering_enabled({POST: [one, two, three], PRE: (8, 0.5)}):
        together = logits(model)
    with model.steering_enabled({POST: one, PRE: (8, 0.5)}), model.steering_enabled({POST: [two, three]}):
        assert torch.equal(logits(model), together)
    with model.steering_enabled({POST: Edit(feature=3, value=8, mode="set")}), model.steering_enabled({POST: three}):
        with model.steering_enabled({PRE: [(8, 0.5)]}):
            torch.testing.assert_close(logits(model), together)
        assert not torch.equal(logits(model), together)


def test_entering_tracking_again_leaves_the_outer_one_at_work(model: InterpretableModel) -> None:
    with model.interpretation_enabled():
        with model.interpretation_enabled():
            model(IDS[:, :3])
        model(IDS[:, :5])
        assert model.get_active_features()[PRE].shape == (2, 5, F)
    assert model.get_active_features()[PRE].shape == (2, 5, F)


def test_tracking_tells_the_codes_before_an_edit_or_after_it(model: InterpretableModel) -> None:
    edit = {MID: Edit(feature=3, value=50, mode="set")}
    seen = {}
    for order in ("track first", "steer first"):
        for when in ("before", "after"):
            track, steer = model.interpretation_enabled(when=when), model.steering_enabled(edit)
            outer, inner = (track, steer) if order == "track first" else (steer, track)
            with outer, inner:
                model(IDS)
            seen[order, when] = model.get_active_features()
    with model.interpretation_enabled():
        model(IDS)
    plain = model.get_active_features()
    for when in ("before", "after"):
        for name in (PRE, MID, POST):
            assert torch.equal(seen["track first", when][name].to_dense(), seen["steer first", when][name].to_dense())
    before, after = (seen["track first", when] for when in ("before", "after"))
    assert torch.equal(before[MID].to_dense(), plain[MID].to_dense())
    assert torch.equal(after[PRE].to_dense(), plain[PRE].to_dense())
    assert (after[MID].to_dense()[:, :, 3] > 40).all()
    assert not torch.allclose(before[POST].to_dense(), plain[POST].to_dense())


def test_the_end_of_a_block_sees_an_edit_in_its_middle_in_whatever_order_they_are_named(
    model: InterpretableModel,
) -> None:
    point, edits = HookPoint(1, "resid_post"), {MID: Edit(feature=3, value=50, mode="set")}
    turned = InterpretableModel(model.model, dict(reversed(model.saes.items())))
    assert list(turned.saes) == [POST, MID, PRE]
    with turned.steering_enabled(edits), turned.interpretation_enabled():
        x = read(turned.model, [point])[point]  # by a hook that is set last
    assert torch.equal(turned.get_active_features()[POST].to_dense(), dense(turned.saes[POST], x))


def fail(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("spoil", ["the forward", "the block of the with", "a second hook point", "a missing module"])
def test_no_failure_leaves_a_hook_or_a_wish_behind(model: InterpretableModel, spoil: str) -> None:
    plain = logits(model)
    steering: dict[str, Any] = {POST: (3, 7.0, "set")}
    if spoil == "the forward":
        with pytest.raises(IndexError), model.interpretation_enabled(), model.steering_enabled(steering):
            model(torch.full((1, 3), int(TINY["vocab_size"])))
    elif spoil == "the block of the with":
        with pytest.raises(KeyboardInterrupt), model.steering_enabled(steering), model.interpretation_enabled():
            fail()
    elif spoil == "a second hook point":
        with pytest.raises(ArgumentError), model.steering_enabled(steering | {MID: (F, 1.0)}):
            pass
    else:
        norm = model.model.model.layers[1].post_attention_layernorm
        del model.model.model.layers[1].post_attention_layernorm
        with pytest.raises(AttributeError, match="post_attention_layernorm"), model.interpretation_enabled():
            pass
        assert num_hooks(model) == 0
        model.model.model.layers[1].post_attention_layernorm = norm
    assert num_hooks(model) == 0
    assert torch.equal(logits(model), plain)
    with model.interpretation_enabled():
        assert torch.equal(logits(model), plain)
    assert set(model.get_active_features()) == {PRE, MID, POST}


def test_a_thousand_contexts_leave_no_hook_and_no_object(
    model: InterpretableModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)

    def enter(times: int) -> int:
        for _ in range(times):
            with model.interpretation_enabled(), model.steering_enabled({POST: [(3, 2.0), (4, 0.5)]}):
                pass
        gc.collect()
        return len(gc.get_objects())

    with model.interpretation_enabled():
        model(IDS[:1, :2])
    before = enter(10)
    assert abs(enter(1000) - before) < 20
    assert num_hooks(model) == 0


# what was tracked


def test_cached_generation_gives_the_codes_of_the_whole_text(model: InterpretableModel) -> None:
    with model.interpretation_enabled():
        text = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
        inside = model.get_active_features()
    assert text.shape == (2, 13)
    with model.interpretation_enabled():
        model(text[:, :-1], use_cache=False)
    for name, whole in model.get_active_features().items():
        assert inside[name].is_sparse
        assert inside[name].shape == (2, 12, F)
        torch.testing.assert_close(inside[name].to_dense(), whole.to_dense(), rtol=1e-3, atol=1e-3)


def test_generation_is_steered_and_tracked_at_once_with_a_cache_and_without(model: InterpretableModel) -> None:
    how = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    plain, found = model.generate(IDS, **how), {}
    for use_cache in (True, False):
        with model.steering_enabled({MID: (3, 20, "set")}), model.interpretation_enabled(when="after"):
            text = model.generate(IDS, use_cache=use_cache, **how)
        found[use_cache] = (text, model.get_active_features()[MID].to_dense())
        assert model.get_steered_positions()[MID].touched == 2 * (12 if use_cache else sum(range(7, 13)))
    assert torch.equal(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-3, atol=1e-3)
    assert (found[True][1][:, :, 3] > 15).all()
    assert not torch.equal(found[True][0], plain)
    assert torch.equal(model.generate(IDS, **how), plain)


def on(cache: Any) -> dict[str, Any]:
    """The arguments that make a forward go on from a cache: transformers 5.24 renamed the one that carries it."""
    names = inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache, "use_cache": True}


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # the older name, where the newer is known
def test_a_forward_without_a_cache_replaces_and_one_with_it_extends_or_rewinds(
    name: str, model: InterpretableModel
) -> None:
    cache = DynamicCache()
    with model.interpretation_enabled():
        model(IDS[:1, :3])
        model(IDS[:, :4], **{name: cache}, use_cache=True)
        model(IDS[:, 4:6], **{name: cache}, use_cache=True)
        assert model.get_active_features()[PRE].shape == (2, 6, F)
        cache.crop(-1)
        model(IDS[:, 5:], **{name: cache}, use_cache=True)
        pieces = model.get_active_features()
        model(IDS)
    for point, whole in model.get_active_features().items():
        torch.testing.assert_close(pieces[point].to_dense(), whole.to_dense(), rtol=1e-3, atol=1e-3)
    with model.interpretation_enabled():
        model(IDS[:, :2], **{name: cache}, use_cache=True)
        assert model.get_active_features()[PRE].shape == (2, 2, F)


def test_the_strongest_features_are_those_of_the_dense_codes_by_value_then_id(model: InterpretableModel) -> None:
    with model.interpretation_enabled():
        model(IDS)
    for name, codes in model.get_active_features().items():
        z = codes.to_dense()
        indices, values = model.get_active_features(name, top_k=9)[name]
        assert indices.shape == values.shape == (2, 7, 9)
        for where in torch.cartesian_prod(torch.arange(2), torch.arange(7)):
            row, position = where.tolist()
            pairs = sorted((-float(v), i) for i, v in enumerate(z[row, position]) if v > 0)[:9]
            pairs += [(0.0, -1)] * (9 - len(pairs))
            got = zip((-values[row, position]).tolist(), indices[row, position].tolist(), strict=True)
            assert [(v + 0.0, i) for v, i in got] == pairs
    assert model.get_active_features(top_k=1000)[PRE].values.shape == (2, 7, F)


def test_what_was_tracked_stays_until_the_next_time_or_until_it_is_dropped(model: InterpretableModel) -> None:
    with pytest.raises(
        RuntimeError, match=r"^No features available\. Use interpretation_enabled\(\) context manager\.$"
    ):
        model.get_active_features()
    with model.interpretation_enabled():
        model(IDS)
        with pytest.raises(ValueError, match=r"^No features for hook point: blocks\.0\.hook_resid_pre$"):
            model.get_active_features("blocks.0.hook_resid_pre")
    assert list(model.get_active_features(MID)) == [MID]
    with model.interpretation_enabled():
        with pytest.raises(ValueError, match="No features for hook point"):
            model.get_active_features(MID)
        assert model.get_active_features() == {}
        model(IDS)
    with pytest.raises(ArgumentError, match="top_k is 0; expected at least 1"):
        model.get_active_features(top_k=0)
    model.clear_active_features()
    with pytest.raises(RuntimeError):
        model.get_active_features()


def test_tracking_makes_no_gradient_and_steering_lets_it_through() -> None:
    model = InterpretableModel(llama().requires_grad_(True), {MID: make_sae(k=None)})
    feature = strongest(model, MID)
    weight = model.model.model.embed_tokens.weight
    with model.interpretation_enabled():
        plain = logits(model).sum()
    assert not model.get_active_features()[MID].requires_grad
    (without,) = torch.autograd.grad(plain, weight)
    (steered,) = torch.autograd.grad(model.steer(IDS, (MID, feature), 3.0).logits.sum(), weight)
    assert torch.isfinite(steered).all()
    assert not torch.allclose(steered, without)


# numbers at their edges


def test_strengths_one_zero_minus_one_and_a_million(model: InterpretableModel) -> None:
    feature, plain = strongest(model, POST), logits(model)
    results = {strength: logits_at(model, feature, strength) for strength in (1.0, 0.0, -1.0, 1e6)}
    assert torch.equal(results[1.0], plain)
    for result in results.values():
        assert torch.isfinite(result).all()
    assert len({result.sum().item() for result in results.values()}) == 4
    half = logits_at(model, feature, 0.5)
    assert (half - plain).abs().max() < (results[0.0] - plain).abs().max() < (results[-1.0] - plain).abs().max()


def logits_at(model: InterpretableModel, feature: int, strength: float) -> Tensor:
    result: Tensor = model.steer(IDS, (POST, feature), strength).logits
    return result


def test_a_bfloat16_model_takes_a_million_and_a_float16_model_says_why_not(model: InterpretableModel) -> None:
    narrow = InterpretableModel(llama().to(torch.bfloat16), model.saes)
    feature, plain = strongest(narrow, POST), logits(narrow)
    assert torch.equal(logits_at(narrow, feature, 1.0), plain)
    steered = logits_at(narrow, feature, 1e6)
    assert steered.dtype == torch.bfloat16
    assert torch.isfinite(steered).all()
    half = InterpretableModel(llama().to(torch.float16), model.saes)
    with pytest.raises(
        ArgumentError, match=r"^the edits scale 1e\+06 of feature \d+ push activations beyond 6\.55e\+04"
    ):
        logits_at(half, feature, 1e6)
    assert num_hooks(half) == 0


def test_autocast_does_not_reach_the_codes(model: InterpretableModel) -> None:
    point = HookPoint(1, "resid_mid")
    with torch.autocast("cpu", torch.bfloat16):
        x = read(model.model, [point])[point]
        with model.interpretation_enabled():
            model(IDS)
    assert torch.equal(model.get_active_features()[MID].to_dense(), dense(model.saes[MID], x))


def test_activations_that_are_not_finite_are_refused_by_name(model: InterpretableModel) -> None:
    model.model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    message = r"^activations at blocks\.1\.hook_resid_pre are NaN or infinite"
    with pytest.raises(ArgumentError, match=message), model.interpretation_enabled():
        model(IDS)
    assert num_hooks(model) == 0


def test_the_error_of_the_sae_is_dropped_only_on_demand(model: InterpretableModel) -> None:
    plain, point = logits(model), HookPoint(1, "resid_post")
    dropped = model.steer(IDS, (POST, 3), 1.0, error_term="drop").logits
    assert model.get_steered_positions() == {POST: (14, 14)}
    x, sae = read(model.model, [point])[point], model.saes[POST]
    expected = model.model.lm_head(model.model.model.norm(sae.reconstruct(x, sae.encode(x))))
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(dropped, plain)


# what is said


def test_positions_are_counted_and_steering_that_touches_none_says_so(
    model: InterpretableModel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="Nothing was steered"):
        model.get_steered_positions()
    feature = strongest(model, POST)
    num_firing = int((model.get_active_features()[POST].to_dense()[:, :, feature] > 0).sum())
    assert 0 < num_firing < 14
    with model.steering_enabled({POST: (feature, 3.0), MID: Edit(feature=1, value=1, mode="add")}):
        model(IDS)
        assert model.get_steered_positions() == {POST: (num_firing, 14), MID: (14, 14)}
        model(IDS)
    assert model.get_steered_positions() == {POST: (2 * num_firing, 28), MID: (28, 28)}
    assert caplog.text == ""
    model.steer(IDS, (POST, feature), 1.0)
    assert model.get_steered_positions() == {POST: (0, 14)}
    assert f"steering at {POST} touched none of 14 positions" in caplog.text
    with model.steering_enabled({PRE: (0, 2.0)}):
        pass
    assert f"steering at {PRE} touched nothing: no forward of this model ran in this thread" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"blocks.0.hook_resid_post": (1, 2.0)}, r"^No SAE for hook point: blocks\.0\.hook_resid_post$"),
        ({POST: (F, 2.0)}, rf"there is no feature {F}; expected 0 to {F - 1}$"),
        ({POST: (-1, 2.0)}, "there is no feature -1"),
        ({POST: (1.5, 2.0)}, "expected a whole number for the feature and a number"),
        ({POST: (1, float("nan"))}, "strength of feature 1 is nan; expected a finite number"),
        ({POST: (1, float("inf"))}, "strength of feature 1 is inf"),
        ({POST: []}, "there are no edits"),
        ({POST: [3, 2.0]}, r"an edit is 3; expected \(feature, strength\)"),
        ({POST: (1, 1, "mul")}, "mode of feature 1 is 'mul'; expected scale, add, set"),
    ],
)
def test_steering_that_cannot_be_done_is_refused_before_a_hook_is_set(
    model: InterpretableModel, config: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message), model.steering_enabled(config):
        raise AssertionError
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resid_post", r"^Invalid hook point: resid_post"),
        ("layers.x.hook_resid_post", r"^Invalid hook point: layers\.x"),
        ("blocks.1.hook_attnmlp", r"^Unknown hook type: hook_attnmlp"),
        ("blocks.1.attn.hook_q", r"^Unknown hook type: attn\.hook_q"),
        ("blocks.2.hook_resid_post", r"asks for layer 2, but the model has layers 0 to 1$"),
    ],
)
def test_hook_points_that_the_model_has_not_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterpretableModel(llama(), {name: make_sae()})


def test_other_arguments_that_cannot_be_used_are_refused(model: InterpretableModel) -> None:
    with pytest.raises(ValueError, match="read the same hook point"):
        InterpretableModel(llama(), {POST: make_sae(), "model.layers.1": make_sae()})
    with pytest.raises(ValueError, match="when is 'later'"), model.interpretation_enabled(when="later"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="error_term is 'lose'"):
        model.steer(IDS, (POST, 1), 1.0, error_term="lose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear is not supported"):
        InterpretableModel(nn.Linear(2, 2), {})
    wrong = InterpretableModel(llama(), {POST: make_sae(width=12)})
    with (
        pytest.raises(ValueError, match=r"is 12 wide, but the activations are 16 wide"),
        wrong.interpretation_enabled(),
    ):
        wrong(IDS)
    with pytest.raises(ValueError, match="num_beams is 3"), model.interpretation_enabled():
        model.generate(IDS, num_beams=3, max_new_tokens=2)


# threads and models


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run in threads at once; results in order."""
    results: list[Any] = [None] * len(works)

    def run(place: int, work: Callable[[], Any]) -> None:
        results[place] = work()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_on_one_model_do_not_see_each_other(model: InterpretableModel) -> None:
    barrier = threading.Barrier(3, timeout=60)
    wishes = [{MID: Edit(feature=3, value=9, mode="set")}, {MID: (5, -4.0), POST: Edit(feature=1, value=2, mode="add")}]
    lengths = (3, 5, 7)

    def steered(wish: dict[str, Any], length: int) -> list[Any]:
        found = []
        for _ in range(20):
            barrier.wait()
            with model.steering_enabled(wish), model.interpretation_enabled():
                found.append((logits(model, IDS[:, :length]), model.get_active_features()[POST].to_dense()))
        return found

    def plain() -> list[Any]:
        found = []
        for _ in range(20):
            barrier.wait()
            found.append((logits(model, IDS), None))
        return found

    expected = []
    for wish, length in zip(wishes, lengths, strict=False):
        with model.steering_enabled(wish), model.interpretation_enabled():
            expected.append((logits(model, IDS[:, :length]), model.get_active_features()[POST].to_dense()))
    expected.append((logits(model, IDS), None))
    found = together(lambda: steered(wishes[0], 3), lambda: steered(wishes[1], 5), plain)
    for runs, (output, codes) in zip(found, expected, strict=True):
        for one, tracked in runs:
            assert torch.equal(one, output)
            assert codes is None or torch.equal(tracked, codes)
    assert num_hooks(model) == 0


def test_two_wrappers_of_one_model_and_two_models_keep_apart() -> None:
    inner, other = llama(), llama()
    one, two, three = (InterpretableModel(m, {POST: make_sae()}) for m in (inner, inner, other))
    plain = logits(inner)
    with one.steering_enabled({POST: Edit(feature=3, value=9, mode="set")}):
        first = logits(one)
        with two.interpretation_enabled():
            assert torch.equal(logits(two), first)
            assert torch.equal(logits(three), plain)
        with two.steering_enabled({POST: Edit(feature=4, value=9, mode="set")}):
            both = logits(inner)
    assert not torch.equal(both, first)
    assert torch.equal(logits(inner), plain)
    assert num_hooks(inner) == num_hooks(other) == 0


# nanochat's own model


class GptBlock(nn.Module):
    """The part of nanochat's block that hooks see: bare tensors, norms that are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.c_proj = nn.Linear(D, D, bias=False)
        self.attn.forward = lambda x, cos_sin: self.attn.c_proj(x.cumsum(1) * cos_sin)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(D, 24, bias=False), nn.Linear(24, D, bias=False)
        self.mlp.forward = lambda x: self.mlp.c_proj(self.mlp.c_fc(x).relu().square())

    def forward(self, x: Tensor, cos_sin: float) -> Tensor:
        x = x + self.attn(nn.functional.rms_norm(x, (D,)), cos_sin)
        return x + self.mlp(nn.functional.rms_norm(x, (D,)))


class Gpt(nn.Module):
    """nanochat's GPT in small: a config without a family, `transformer.h`, `get_device`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_layer=NUM_LAYERS, n_embd=D)
        blocks = nn.ModuleList(GptBlock() for _ in range(NUM_LAYERS))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(32, D), "h": blocks})

    def get_device(self) -> torch.device:
        return self.transformer["wte"].weight.device

    def forward(self, idx: Tensor, kv_cache: Any = None) -> Tensor:
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:
            x = block(x, 0.5)
        return x


@pytest.fixture
def gpt() -> Iterator[Gpt]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield Gpt().requires_grad_(False)


def test_nanochats_own_model_is_read_and_steered(gpt: Gpt) -> None:
    model = InterpretableModel(gpt, {PRE: make_sae(seed=1), POST: make_sae(seed=2)})
    plain = gpt(IDS)
    assert torch.equal(model.steer(IDS, (PRE, strongest(model, PRE)), 1.0), plain)
    assert not torch.equal(model.steer(IDS, (PRE, strongest(model, PRE)), 0.0), plain)
    assert torch.equal(model.get_active_features()[POST].to_dense(), dense(model.saes[POST], plain))
    with model.interpretation_enabled():
        model(IDS[:, :4])
        model(IDS[:, 4:], kv_cache=SimpleNamespace(get_pos=lambda: 4))
    assert model.get_active_features()[POST].shape == (2, 7, F)
    with pytest.raises(ValueError, match="this model family has no resid_mid"):
        InterpretableModel(gpt, {MID: make_sae()})
