"""Which tensor is which stream: residual arithmetic on a tiny random model of every family."""

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from sae_census.errors import ConfigError
from sae_census.io.model.families import FAMILIES, family_of, streams_of
from sae_census.io.model.hooks import Captures, find_blocks
from sae_census.types import STREAMS, HookPoint, Stream

NUM_LAYERS = 2
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1}
WIDE_HEADS = GROUPED | {"head_dim": 12}  # the heads together are wider than the residual stream


class Layout(NamedTuple):
    """What the modelling code of a family calls its parts; written down here apart from the table under test."""

    config: dict[str, object]
    final_norm: str = "norm"
    to_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    down: str = "down_proj"
    norm_of_attn: str = ""
    """The norm between W_O and the residual stream, if there is one."""
    norm_of_mlp: str = ""
    parallel: bool = False
    lacks: tuple[Stream, ...] = ()
    """Streams that some block of the family has not."""


GEMMA2 = Layout(
    WIDE_HEADS | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    mlp_norm="pre_feedforward_layernorm",
    norm_of_attn="post_attention_layernorm",
    norm_of_mlp="post_feedforward_layernorm",
)
NEOX = Layout({}, final_norm="final_layer_norm", to_out="attention.dense", down="dense_4h_to_h", parallel=True)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
HYBRID = WIDE_HEADS | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LAYOUTS = {
    "llama": Layout(GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": Layout(GROUPED | {"sliding_window": 4}),
    "qwen2": Layout(GROUPED),
    "qwen3": Layout(WIDE_HEADS),
    "qwen3_moe": Layout(WIDE_HEADS | EXPERTS, lacks=("mlp_post",)),
    "qwen3_5_text": Layout(HYBRID, lacks=("attn_out", "attn_z")),
    "qwen3_5_moe_text": Layout(
        HYBRID | EXPERTS | {"shared_expert_intermediate_size": 8}, lacks=("attn_out", "attn_z", "mlp_post")
    ),
    "gemma": Layout(WIDE_HEADS),
    "phi3": Layout(GROUPED),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gpt2": Layout({"n_inner": 24}, final_norm="ln_f", to_out="attn.c_proj", mlp_norm="ln_2", down="c_proj"),
    "gpt_neox": NEOX,
    "gpt_neox sequential": NEOX._replace(config={"use_parallel_residual": False}, parallel=False),
    "nanochat": Layout(GROUPED, down="fc2"),
    "phi": Layout(
        {},
        final_norm="final_layernorm",
        to_out="self_attn.dense",
        mlp_norm="input_layernorm",
        down="fc2",
        parallel=True,
    ),
}


class Tiny(NamedTuple):
    """A random model of one family with its streams."""

    layout: Layout
    model: nn.Module
    blocks: nn.ModuleList
    taps: dict[Stream, object]

    def points(self) -> list[HookPoint]:
        return [HookPoint(layer, stream) for layer in range(NUM_LAYERS) for stream in self.taps]

    def capture(self, points: Iterable[HookPoint], ids: Tensor) -> dict[HookPoint, Tensor]:
        with Captures(self.blocks, self.taps, points) as captures:
            return captures.run(self.model, ids)

    def through(self, layer: int, path: str, value: Tensor) -> Tensor:
        """`value` through a module of a block; unchanged if the family has no such module."""
        return self.blocks[layer].get_submodule(path)(value) if path else value


def build(name: str) -> Tiny:
    """Every weight random, also those of norms and biases, so that no two tensors of a block are equal."""
    layout = LAYOUTS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(name.split()[0], **TINY, **layout.config)).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.4)
    return Tiny(layout, model.requires_grad_(False), find_blocks(model, NUM_LAYERS), streams_of(model.config))


def skip_without(tiny: Tiny, stream: Stream) -> None:
    if stream in tiny.layout.lacks:
        pytest.skip(f"the family has no {stream}")


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=LAYOUTS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return build(request.param)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.arange(14).view(2, 7) % 11 + 3


@pytest.fixture(scope="module")
def got(tiny: Tiny, ids: Tensor) -> dict[HookPoint, Tensor]:
    """Every stream of every block, from one forward pass."""
    return tiny.capture(tiny.points(), ids)


@pytest.fixture(scope="module", params=range(NUM_LAYERS))
def layer(request: pytest.FixtureRequest) -> int:
    return request.param


def test_every_family_of_the_table_is_tried_here():
    assert {name.split()[0] for name in LAYOUTS} == set(FAMILIES) - {"gemma3"}  # gemma3_text inside a vision model


def test_one_forward_yields_all_streams_of_all_blocks(tiny, got, ids):
    absent = {*tiny.layout.lacks, *(["resid_mid"] if tiny.layout.parallel else [])}
    assert set(got) == {HookPoint(n, s) for n in range(NUM_LAYERS) for s in STREAMS if s not in absent}
    assert all(value.ndim == 3 and value.shape[:2] == ids.shape for value in got.values())


def test_the_residual_streams_are_the_hidden_states_that_transformers_reports(tiny, got, ids):
    *before, last = tiny.model(input_ids=ids, output_hidden_states=True).hidden_states
    for n in range(NUM_LAYERS):
        close(got[HookPoint(n, "resid_pre")], before[n])
        after = got[HookPoint(n, "resid_post")]
        if n + 1 < NUM_LAYERS:
            close(after, before[n + 1])
            close(after, got[HookPoint(n + 1, "resid_pre")])
        else:  # the last reported one is after the final norm
            close(tiny.model.get_submodule(tiny.layout.final_norm)(after), last)


def test_what_attention_and_mlp_write_adds_up_to_the_residual_stream(tiny, got, layer):
    def at(stream: Stream) -> Tensor:
        return got[HookPoint(layer, stream)]

    if not tiny.layout.parallel:
        close(at("resid_post"), at("resid_mid") + at("mlp_out"))
    if not tiny.layout.parallel and "attn_out" not in tiny.layout.lacks:
        close(at("resid_mid"), at("resid_pre") + at("attn_out"))
    if "attn_out" not in tiny.layout.lacks:
        close(at("resid_post"), at("resid_pre") + at("attn_out") + at("mlp_out"))


def test_z_through_the_output_matrix_is_what_attention_writes(tiny, got, layer):
    skip_without(tiny, "attn_z")
    written = tiny.through(layer, tiny.layout.to_out, got[HookPoint(layer, "attn_z")])
    close(got[HookPoint(layer, "attn_out")], tiny.through(layer, tiny.layout.norm_of_attn, written))


def test_mlp_in_is_the_normed_stream(tiny, got, layer):
    stream = got[HookPoint(layer, "resid_pre" if tiny.layout.parallel else "resid_mid")]
    close(got[HookPoint(layer, "mlp_in")], tiny.through(layer, tiny.layout.mlp_norm, stream))


def test_mlp_in_is_what_the_mlp_reads_and_mlp_post_what_its_last_matrix_reads(tiny, got, layer):
    written = tiny.through(layer, "mlp", got[HookPoint(layer, "mlp_in")])
    close(got[HookPoint(layer, "mlp_out")], tiny.through(layer, tiny.layout.norm_of_mlp, written))
    skip_without(tiny, "mlp_post")
    close(tiny.through(layer, f"mlp.{tiny.layout.down}", got[HookPoint(layer, "mlp_post")]), written)


def test_stopping_early_gives_the_same_tensors(tiny, got, ids):
    for point in tiny.points():
        alone = tiny.capture([point], ids)
        assert alone.keys() == {point}
        assert torch.equal(alone[point], got[point]), point


def test_stopping_early_runs_no_later_block_and_no_later_part_of_the_block(tiny, ids):
    skip_without(tiny, "attn_z")
    skip_without(tiny, "mlp_post")
    ran = []
    down = tiny.blocks[0].get_submodule(f"mlp.{tiny.layout.down}")
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in {"down": down, "next block": tiny.blocks[1]}.items()
    ]
    tiny.capture([HookPoint(0, "attn_z")], ids)
    tiny.capture([HookPoint(0, "mlp_in"), HookPoint(0, "resid_pre")], ids)
    assert ran == []
    tiny.capture([HookPoint(0, "resid_post")], ids)
    assert ran == ["down"]
    tiny.capture([HookPoint(1, "resid_pre"), HookPoint(0, "resid_post")], ids)
    assert ran == ["down", "down", "next block"]
    for handle in handles:
        handle.remove()


def test_captures_change_no_output_and_leave_no_hook(tiny, ids):
    before, hooks = tiny.model(input_ids=ids).last_hidden_state, num_hooks(tiny.model)
    with Captures(tiny.blocks, tiny.taps, tiny.points()) as captures:
        assert num_hooks(tiny.model) == hooks + len(tiny.points())
        captures.run(tiny.model, ids)
    assert num_hooks(tiny.model) == hooks
    assert torch.equal(tiny.model(input_ids=ids).last_hidden_state, before)


def test_captures_leave_no_hook_after_an_exception():
    tiny = build("llama")
    hooks = num_hooks(tiny.model)
    with pytest.raises(IndexError), Captures(tiny.blocks, tiny.taps, tiny.points()) as captures:
        captures.run(tiny.model, torch.full((1, 3), TINY["vocab_size"]))
    with pytest.raises(KeyboardInterrupt), Captures(tiny.blocks, tiny.taps, tiny.points()):
        raise KeyboardInterrupt
    assert num_hooks(tiny.model) == hooks


def test_captures_of_a_block_that_lacks_a_module_leave_no_hook():
    tiny = build("llama")
    del tiny.blocks[1].mlp.down_proj
    hooks = num_hooks(tiny.model)
    with pytest.raises(AttributeError, match="down_proj"), Captures(tiny.blocks, tiny.taps, tiny.points()):
        pass
    assert num_hooks(tiny.model) == hooks


def test_captures_may_run_many_times_and_a_point_may_be_named_twice():
    tiny, points = build("gpt2"), [HookPoint(1, "mlp_out"), HookPoint(0, "mlp_out"), HookPoint(1, "mlp_out")]
    batches = [torch.full((1, length), length) for length in (2, 5)]
    with Captures(tiny.blocks, tiny.taps, points) as captures:
        several = [captures.run(tiny.model, batch) for batch in batches]
    for batch, together in zip(batches, several, strict=True):
        for point in points:
            assert torch.equal(together[point], tiny.capture([point], batch)[point])


def test_what_stands_after_a_token_does_not_reach_it(tiny, got, ids):
    changed = tiny.capture(tiny.points(), torch.cat([ids[:, :4], ids[:, 4:] + 7], dim=1))
    for point, value in got.items():
        close(changed[point][:, :4], value[:, :4])
        assert not torch.allclose(changed[point][:, 4:], value[:, 4:]), point


def test_a_layer_out_of_range_is_refused():
    tiny = build("llama")
    message = r"^hook point blocks\.2\.hook_resid_post asks for layer 2, but the model has layers 0 to 1$"
    with pytest.raises(ConfigError, match=message):
        Captures(tiny.blocks, tiny.taps, [HookPoint(2, "resid_post")])


def test_a_stream_that_the_family_lacks_is_refused():
    tiny = build("phi")
    message = (
        r"^hook point blocks\.0\.hook_resid_mid: this model family has no resid_mid; it has resid_pre, .*mlp_post$"
    )
    with pytest.raises(ConfigError, match=message):
        Captures(tiny.blocks, tiny.taps, [HookPoint(0, "resid_mid")])


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"^model family 'mamba' is not supported; expected one of gemma, .*qwen3_moe$"
    ):
        family_of("mamba")


def test_the_blocks_are_found_beside_a_vision_tower_of_the_same_depth():
    model = nn.Module()
    model.vision_tower, model.language_model = nn.Module(), nn.Module()
    for tower in (model.vision_tower, model.language_model):
        tower.layers = nn.ModuleList(nn.Identity() for _ in range(NUM_LAYERS))
    assert find_blocks(model, NUM_LAYERS) is model.language_model.layers


@pytest.mark.parametrize(("num_lists", "found"), [(0, "none"), (2, "0, 1")])
def test_no_list_of_blocks_or_two_are_refused(num_lists, found):
    model = nn.Sequential(*(nn.ModuleList([nn.Identity()]) for _ in range(num_lists)))
    with pytest.raises(ConfigError, match=f"^expected one list of 1 decoder blocks in the model, found {found}$"):
        find_blocks(model, 1)


@given(st.integers(0, 10**6), st.sampled_from(STREAMS))
def test_a_hook_point_survives_being_written_and_read(layer_index, stream):
    point = HookPoint(layer_index, stream)
    assert HookPoint.parse(str(point)) == point


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.15.hook_resid_pre", HookPoint(15, "resid_pre")),
        ("blocks.15.hook_resid_mid", HookPoint(15, "resid_mid")),
        ("blocks.15.hook_resid_post", HookPoint(15, "resid_post")),
        ("blocks.15.hook_attn_out", HookPoint(15, "attn_out")),
        ("blocks.15.attn.hook_z", HookPoint(15, "attn_z")),
        ("blocks.15.mlp.hook_in", HookPoint(15, "mlp_in")),
        ("blocks.15.hook_mlp_out", HookPoint(15, "mlp_out")),
        ("blocks.15.mlp.hook_post", HookPoint(15, "mlp_post")),
        ("model.layers.15", HookPoint(15, "resid_post")),
        ("layers.15", HookPoint(15, "resid_post")),
        ("gpt_neox.layers.15.output", HookPoint(15, "resid_post")),
        ("model.language_model.layers.15.input", HookPoint(15, "resid_pre")),
        ("transformer.h.15.output", HookPoint(15, "resid_post")),
        ("h.0", HookPoint(0, "resid_post")),
    ],
)
def test_hook_points_are_read_from_public_names_and_block_paths(name, point):
    assert HookPoint.parse(name) == point


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resid_post",
        "hook_resid_post",
        "blocks.hook_resid_post",
        "blocks.-1.hook_resid_post",
        "blocks.1.resid_post",
        "blocks.1.hook_resid_post.0",
        "blocks.1.attn.hook_q",
        "blocks.1.ln2.hook_normalized",
        "model.blocks.1.hook_resid_post",
        "model.layers.1.mlp",
        "model.layers.1.mlp.output",
        "model.layers",
        "blocks.1",
        "model.embed_tokens",
    ],
)
def test_other_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError) as refusal:
        HookPoint.parse(name)
    assert str(refusal.value) == (
        f"hook point {name!r} is not known; expected blocks.<layer>.<name> with <name> one of hook_resid_pre, "
        "hook_resid_mid, hook_resid_post, hook_attn_out, attn.hook_z, mlp.hook_in, hook_mlp_out, mlp.hook_post"
    )


def test_the_ambiguous_hook_mlp_in_is_refused_with_both_its_meanings():
    with pytest.raises(ConfigError, match=r"ambiguous: say mlp.hook_in \(normed\) or hook_resid_mid \(not normed\)$"):
        HookPoint.parse("blocks.1.hook_mlp_in")
