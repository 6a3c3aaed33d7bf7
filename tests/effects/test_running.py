"""Models as people run them: entered anywhere, with every kind of cache, compiled, wrapped, copied, in threads."""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from test_hooks import NUM_LAYERS, TINY, num_hooks
from test_interpretable import IDS, MID, POST, PRE, D, F, Gpt, GptBlock, dense, llama, logits, make_sae, on, read
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    pipeline,
)

from sae_census.compute.effects.edits import Edit
from sae_census.errors import ArgumentError
from sae_census.flows.effects.interpretable import InterpretableModel
from sae_census.flows.notebook.observe import capture_residual, encode_prompts
from sae_census.types import HookPoint

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


class Slots:
    """nanochat's cache: all slots at once, counted by `get_pos`; those of samples are filled from the prompt's."""

    def __init__(self, num_rows: int, prompt: "Slots | None" = None):
        self.kept = torch.zeros(NUM_LAYERS, num_rows, 32, D)
        self.position = 0
        if prompt is not None:
            self.kept[:], self.position = prompt.kept, prompt.position

    def get_pos(self) -> int:
        return self.position

    def insert(self, layer: int, x: Tensor) -> Tensor:
        end = self.position + x.shape[1]
        self.kept[layer, :, self.position : end] = x
        self.position = end if layer == NUM_LAYERS - 1 else self.position
        return self.kept[layer, :, :end]


class CachedBlock(GptBlock):
    """nanochat's block, which is given the cache by its place."""

    def forward(self, x: Tensor, cos_sin: float, cache: Slots | None = None, layer: int = 0) -> Tensor:  # type: ignore[override]
        whole = x if cache is None else cache.insert(layer, x)
        return super().forward(whole, cos_sin)[:, -x.shape[1] :]


class CachedGpt(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.transformer["h"] = nn.ModuleList(CachedBlock() for _ in range(NUM_LAYERS))

    def forward(self, idx: Tensor, kv_cache: Slots | None = None) -> Tensor:
        x = self.transformer["wte"](idx)
        for layer, block in enumerate(self.transformer["h"]):
            x = block(x, 0.5, kv_cache, layer)
        return x


def test_samples_of_nanochats_engine_are_followed_from_the_prompt_on() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt = CachedGpt().requires_grad_(False)
    model = InterpretableModel(gpt, {PRE: make_sae(seed=1), POST: make_sae(seed=2)})
    for num_samples in (1, 3):
        text = IDS[:1].repeat(num_samples, 1)
        with model.interpretation_enabled():
            prompt = Slots(1)
            gpt.forward(IDS[:1], kv_cache=prompt)  # the engine calls forward itself
            cache = Slots(num_samples, prompt)
            del prompt
            for step in range(4):
                column = torch.arange(num_samples)[:, None] * 5 + step + 3
                gpt.forward(column, kv_cache=cache)
                text = torch.cat([text, column], dim=1)
            found = model.get_active_features()
            model(text)
        for name, expected in model.get_active_features().items():
            assert found[name].shape == (num_samples, 11, F)
            torch.testing.assert_close(found[name].to_dense(), expected.to_dense(), rtol=1e-3, atol=1e-3)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
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


# ways to generate


BEAMS: dict[str, Callable[[Any], Any]] = {
    "argument": lambda model: model.generate(IDS, num_beams=3, max_new_tokens=2),
    "config": lambda model: model.generate(IDS, generation_config=GenerationConfig(num_beams=2, max_new_tokens=2)),
    "positional": lambda model: model.generate(IDS, GenerationConfig(num_beams=2, max_new_tokens=2)),
    "over a config": lambda model: model.generate(IDS, GenerationConfig(num_beams=1), num_beams=2),
    "sampled": lambda model: model.generate(IDS, do_sample=True, num_beams=2, num_return_sequences=2),
    "contrastive": lambda model: model.generate(IDS, penalty_alpha=0.6, top_k=4),
    "groups": lambda model: model.generate(IDS, num_beams=2, num_beam_groups=2, diversity_penalty=1.0),
    "forced words": lambda model: model.generate(IDS, force_words_ids=[[3]], num_beams=2),
    "another loop": lambda model: model.generate(IDS, custom_generate=lambda *_, **__: None),
    "guidance": lambda model: model.generate(IDS, guidance_scale=1.5),
    "early exit": lambda model: model.generate(IDS, assistant_early_exit=1),
}


@pytest.mark.parametrize("how", BEAMS)
@pytest.mark.parametrize("door", ["wrapper", "model"])
def test_generation_whose_rows_are_not_the_result_is_refused_while_codes_are_tracked(
    model: InterpretableModel, how: str, door: str
) -> None:
    generate = BEAMS[how]
    with (
        pytest.raises(
            ArgumentError,
            match=r"tracked codes and chosen positions are those of the rows that run.*generate without tracking",
        ),
        model.interpretation_enabled(),
    ):
        generate(model if door == "wrapper" else model.model)
    assert "generate" not in vars(model.model)


def test_beams_of_the_checkpoint_are_refused_too_and_one_beam_is_not(model: InterpretableModel) -> None:
    inner: Any = model.model
    inner.generation_config.num_beams = 4
    with model.interpretation_enabled():
        for how in ({}, {"generation_config": GenerationConfig(max_new_tokens=2)}):
            with pytest.raises(ArgumentError, match=r"num_beams is 4 \(the model's own generation_config\)"):
                inner.generate(IDS, **how)
        text = inner.generate(IDS, **HOW, num_beams=1)
    check_codes(model, model.get_active_features(), text[:, :-1])


def test_beams_are_refused_where_positions_are_chosen(model: InterpretableModel) -> None:
    with (
        pytest.raises(ArgumentError, match="chosen positions are those of the rows that run"),
        model.steering_enabled(EDIT, positions="generated"),
    ):
        model.generate(IDS, **HOW, num_beams=2)


def test_beams_are_steered_like_forwards_without_a_cache(model: InterpretableModel) -> None:
    how = HOW | {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    plain = model.generate(IDS, **how)
    with model.steering_enabled(EDIT):
        cached = model.generate(IDS, **how)
        assert torch.equal(cached, model.generate(IDS, **how, use_cache=False))
    assert not torch.equal(cached, plain)


def test_several_samples_of_a_prompt_are_tracked_row_by_row(model: InterpretableModel) -> None:
    torch.manual_seed(0)
    with model.interpretation_enabled():
        text = model.generate(IDS, **HOW | {"do_sample": True}, num_return_sequences=3)
    assert text.shape == (6, 13)
    check_codes(model, model.get_active_features(), text[:, :-1])


# contexts


def in_thread(work: Callable[[], Any]) -> Any:
    """What a thread that starts now returns or raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except ArgumentError as error:
            found.append(error)

    thread = threading.Thread(target=run, name="inner")
    thread.start()
    thread.join()
    return found[0]


def test_a_thread_that_starts_inside_a_block_takes_it_along_or_says_what_to_do(model: InterpretableModel) -> None:
    plain, steered = logits(model), model.steer(IDS, (MID, 3), 20, mode="set").logits

    def apart() -> Tensor:
        with model.steering_enabled({}):
            return logits(model)

    with model.steering_enabled(EDIT):
        refused = in_thread(lambda: logits(model))
        assert isinstance(refused, ArgumentError)
        assert "thread inner began while another tracks or steers this model" in str(refused)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(logits, model)), steered)
        assert torch.equal(in_thread(apart), plain)
        assert torch.equal(logits(model), steered)
    assert torch.equal(in_thread(lambda: logits(model)), plain)


def test_a_thread_that_was_there_before_runs_plain_and_it_is_said_once(
    model: InterpretableModel, caplog: pytest.LogCaptureFixture
) -> None:
    plain = logits(model)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with model.steering_enabled(EDIT):
            for _ in range(2):
                assert torch.equal(pool.submit(logits, model).result(), plain)
            logits(model)
    assert caplog.text.count("runs the model plain while another tracks or steers it") == 1


def test_tasks_of_asyncio_do_not_see_each_other_and_see_the_block_they_were_made_in(model: InterpretableModel) -> None:
    plain, steered = logits(model), model.steer(IDS, (MID, 3), 20, mode="set").logits
    lengths = (3, 5, 7)

    async def track(length: int, edit: dict[str, Any]) -> tuple[Tensor, int]:
        with model.steering_enabled(edit), model.interpretation_enabled():
            await asyncio.sleep(0)
            output = logits(model, IDS[:, :length])
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        return output, model.get_active_features()[MID].shape[1]

    async def main() -> None:
        edits: list[dict[str, Any]] = [{}, EDIT, {POST: (3, 1.0)}]
        found = await asyncio.gather(*(track(*pair) for pair in zip(lengths, edits, strict=True)))
        assert [length for _, length in found] == list(lengths)
        for length, (output, _), expected in zip(lengths, found, (plain, steered, plain), strict=True):
            torch.testing.assert_close(output, expected[:, :length], rtol=1e-4, atol=1e-4)

        async def outer() -> Tensor:
            await started.wait()
            return logits(model)

        started = asyncio.Event()
        beside = asyncio.create_task(outer())
        with model.steering_enabled(EDIT):
            inside = asyncio.create_task(outer())
            started.set()
            assert torch.equal(await beside, plain)
            assert torch.equal(await inside, steered)
            assert torch.equal(await asyncio.to_thread(logits, model), steered)

    asyncio.run(main())
    assert num_hooks(model) == 0


def test_a_cell_with_a_context_of_its_own_reads_what_an_earlier_cell_tracked(model: InterpretableModel) -> None:
    def cell() -> None:
        with model.interpretation_enabled(), model.steering_enabled(EDIT):
            model(IDS)

    contextvars.copy_context().run(cell)
    assert model.get_active_features()[MID].shape == (2, 7, F)
    assert model.get_steered_positions()[MID].touched == 14


def test_two_threads_cannot_run_forwards_in_one_tracking_block(model: InterpretableModel) -> None:
    """They would mix their codes; one after the other is fine."""
    with model.interpretation_enabled():
        model(IDS)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(logits, model, IDS[:, :3])), logits(model, IDS[:, :3]))

        def meet(*_: Any) -> None:
            handle.remove()
            in_thread(lambda: context.run(logits, model, IDS[:, :3]))

        handle = model.model.model.layers[0].register_forward_hook(meet)
        with pytest.raises(ArgumentError, match="two threads run forwards in one tracking block"):
            model(IDS)


def test_a_checkpointed_block_is_edited_again_in_the_backward_pass_and_tracked_once() -> None:
    model = wrap(llama().requires_grad_(True).train())
    inner: Any = model.model
    weight = inner.model.embed_tokens.weight

    def gradient() -> tuple[Tensor, dict[str, Tensor]]:
        with model.steering_enabled(EDIT), model.interpretation_enabled():
            (found,) = torch.autograd.grad(logits(model).square().sum(), weight)
            return found, {name: codes.to_dense() for name, codes in model.get_active_features().items()}

    expected = gradient()
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    found = gradient()
    torch.testing.assert_close(found[0], expected[0])
    for name, codes in expected[1].items():
        assert torch.equal(found[1][name], codes)


# objects that people hold


def test_a_copy_and_a_file_are_the_same_model_with_the_same_saes(model: InterpretableModel, tmp_path: Any) -> None:
    plain, steered = logits(model), model.steer(IDS, (MID, 3), 20, mode="set").logits
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(other), plain)
        with other.steering_enabled(EDIT):
            assert torch.equal(logits(other), steered)
            assert torch.equal(logits(model), plain)
        assert num_hooks(other) == 0
    with model.steering_enabled(EDIT):
        for copying in (lambda: copy.deepcopy(model), lambda: copy.deepcopy(model.model)):
            with pytest.raises(ArgumentError, match="leave the block first"):
                copying()
        with pytest.raises(ArgumentError, match="leave the block first"):
            torch.save(model, tmp_path / "inside.pt")


def test_what_the_wrapper_has_not_is_the_models(model: InterpretableModel, tmp_path: Any) -> None:
    inner: Any = model.model
    assert model.config is inner.config
    assert model.generation_config is inner.generation_config
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = model.nothing_of_the_kind
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    inner.load_state_dict(state)
    plain = model.steer(IDS, (MID, 3), 20, mode="set").logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    steered = half.steer(IDS, (MID, 3), 20, mode="set").logits
    torch.testing.assert_close(steered.float(), plain, rtol=0.2, atol=0.5)


def test_a_pipeline_of_transformers_takes_the_wrapper(model: InterpretableModel, model_dir: Any) -> None:
    inner = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    width = inner.config.hidden_size
    model = InterpretableModel(inner, {POST: make_sae(width)})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=4, do_sample=False)
    plain = run("river water")[0]["generated_text"]
    with model.steering_enabled({POST: Edit(feature=3, value=60, mode="set")}), model.interpretation_enabled():
        steered = run("river water")[0]["generated_text"]
    assert steered != plain
    assert model.get_active_features()[POST].shape[:2] == (1, len(tokenizer("river water").input_ids) + 3)
    assert run("river water")[0]["generated_text"] == plain


def test_weights_that_are_kept_elsewhere_until_they_are_needed(model: InterpretableModel) -> None:
    expected = codes_of(model, IDS)
    steered = model.steer(IDS, (MID, 3), 20, mode="set").logits
    offloaded = wrap(cpu_offload(llama(), execution_device="cpu"))
    for name, codes in codes_of(offloaded, IDS).items():
        assert torch.equal(codes, expected[name])
    assert torch.equal(offloaded.steer(IDS, (MID, 3), 20, mode="set").logits, steered)


class Adapted(nn.Module):
    """A wrapper that, as PEFT's, is not entered by `generate`."""

    def __init__(self, inner: Any):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = inner
        self.config = inner.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.generate(*args, **kwargs)


def test_a_model_inside_a_wrapper_is_followed_and_refuses_beams() -> None:
    model = wrap(Adapted(llama()))
    with model.interpretation_enabled():
        text = model.generate(IDS, **HOW)
        with pytest.raises(ArgumentError, match="num_beams is 2"):
            model.generate(IDS, num_beams=2)
    check_codes(model, model.get_active_features(), text[:, :-1])


def test_a_prompt_beyond_the_positions_of_the_model_is_one_line() -> None:
    tiny = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **TINY)).eval()
    model, long = wrap(tiny), torch.ones(1, 33, dtype=torch.long)
    for run in (model, model.generate, lambda ids: model.steer(ids, (MID, 3), 2.0)):
        with pytest.raises(ArgumentError, match="the input has 33 tokens, but the model has 32 positions"):
            run(long)
    with pytest.raises(ValueError, match="prompt 1 has 33 tokens, but the model has 32 positions"):
        encode_prompts(tiny, lambda text, **_: {"input_ids": long[:, : len(text)]}, make_sae(), ["aa", "a" * 33], 0)
    assert logits(wrap(llama()), long).shape[1] == 33  # rotations are computed for any length


# the names and objects of nanochat's add-on


def test_a_hook_point_may_be_spelled_otherwise_at_every_door() -> None:
    model = InterpretableModel(llama(), {"blocks.1.hook_mlp_out": make_sae(seed=1), "blocks.0.attn": make_sae(seed=2)})
    with model.interpretation_enabled(), model.steering_enabled({"blocks.1.hook_mlp": (3, 9, "set")}):
        steered = logits(model)
    assert list(model.get_active_features()) == ["blocks.0.attn", "blocks.1.hook_mlp_out"]
    assert list(model.get_active_features("blocks.0.hook_attn_out")) == ["blocks.0.attn"]
    assert torch.equal(model.steer(IDS, ("blocks.1.mlp", 3), 9, mode="set").logits, steered)
    with (
        pytest.raises(ArgumentError, match=r"steering names blocks\.1\.hook_mlp_out twice"),
        model.steering_enabled({"blocks.1.mlp": (3, 9), "blocks.1.hook_mlp_out": (4, 9)}),
    ):
        pass


class Foreign:
    """Any object with `encode`."""

    def encode(self, h: Tensor) -> Tensor:
        return (h @ torch.linspace(-9, 9, D * F).sin().view(D, F)).relu()


class Wrong:
    def encode(self, h: Tensor) -> Any:
        return h[0]


def test_any_object_with_encode_can_be_observed(model: InterpretableModel) -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 30 + 1 for letter in text]])}

    texts = ["a", "cab", "be"]
    found = encode_prompts(model.model, tokenizer, Foreign(), texts, 1)
    expected = [
        Foreign().encode(
            read(model.model, [HookPoint(1, "resid_post")], tokenizer(text)["input_ids"])[HookPoint(1, "resid_post")]
        )[0, -1]
        for text in texts
    ]
    assert 0 < (found == 0).float().mean() < 1
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"encode of Wrong gave \(16,\) for \(1, 16\); expected a tensor \(N, F\)"):
        encode_prompts(model.model, tokenizer, Wrong(), ["a"], 1)
    with pytest.raises(TypeError, match="or an object with encode"):
        encode_prompts(model.model, tokenizer, object(), ["a"], 1)


def test_a_compiled_model_is_observed_like_any_other() -> None:
    inner = llama()
    expected = read(inner, [HookPoint(1, "resid_post")])
    inner.compile(backend="eager")
    inner(IDS)
    assert torch.equal(read(inner, [HookPoint(1, "resid_post")])[HookPoint(1, "resid_post")], *expected.values())
    with capture_residual(inner, 1) as bucket:
        inner(IDS)
    assert torch.equal(bucket["h"], *expected.values())
