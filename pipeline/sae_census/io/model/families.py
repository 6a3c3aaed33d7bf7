"""Model families: everything that is known of one stands in its record here, and nowhere else.

A family is the models that share a `config.model_type` of transformers, and so the names of their modules. Names of
streams follow TransformerLens. Where a family has no tensor of that kind the stream is absent, and asking for it is an
error: parallel blocks (phi, most of gpt_neox) have no resid_mid. To add a family, add its record to `_RECORDS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from sae_census.errors import ConfigError
from sae_census.types import Stream


class Tap(NamedTuple):
    """A tensor of a block: the path of a submodule ("" is the block itself) and its side.

    `in` is the first argument of the module's forward, `out` its (first) output.
    """

    path: str
    side: Literal["in", "out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is known of one family. Paths of a block's parts are relative to the block."""

    names: tuple[str, ...]
    """`model_type` of the text configs of its models."""
    called: str | None = None
    """What names of its models begin with, as a regular expression over lower case; None if names do not tell it."""
    streams: Mapping[Stream, Tap]
    """The streams of every block."""
    sequential: Mapping[Stream, Tap] | None = None
    """Streams that it has besides if its config has `use_parallel_residual: false`; None if no config says so."""
    attention_norm: str
    """The norm that attention reads through."""
    mlp_norm: str
    """The norm that the MLP reads through."""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Inside attention: the modules of queries, keys and values, or the one module of all three."""
    by_head: bool = False
    """Whether the one module keeps query, key and value of a head side by side, instead of all queries first."""
    final_norm: str | None
    """The norm before the unembedding, beside the list of blocks; None if its direct logits are not known."""
    layer_norms: bool = False
    """Whether every reader of the residual stream is a LayerNorm, which takes the mean off."""
    gain_less_one: bool = False
    """Whether its norms store the gain less 1, and multiply by 1 + weight."""
    positions: str | None = None
    """The table of learned positions, beside the list of blocks; None if positions are computed."""
    logit_cap: str | None = None
    """The field of the config with the cap c of c·tanh(logit / c); None if logits are not capped."""


def _taps(attn: str, z: str, mlp: str, post: str, mid: str | None = None) -> dict[Stream, Tap]:
    """The streams of a block by its attention, MLP, the last matrix in each, and the norm that reads resid_mid."""
    taps: dict[Stream, Tap] = {
        "resid_pre": Tap("", "in"),
        "resid_post": Tap("", "out"),
        "attn_out": Tap(attn, "out"),
        "attn_z": Tap(f"{attn}.{z}", "in"),
        "mlp_in": Tap(mlp, "in"),
        "mlp_out": Tap(mlp, "out"),
        "mlp_post": Tap(f"{mlp}.{post}", "in"),
    }
    return taps | ({"resid_mid": Tap(mid, "in")} if mid else {})


def _without(taps: Mapping[Stream, Tap], *streams: Stream) -> dict[Stream, Tap]:
    return {stream: tap for stream, tap in taps.items() if stream not in streams}


_LLAMA = Family(
    names=("llama",),
    called=r"(meta-)?llama|smollm|deepseek-r1-distill-llama",
    streams=_taps("self_attn", "o_proj", "mlp", "down_proj", "post_attention_layernorm"),
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="norm",
)
_GEMMA = replace(_LLAMA, names=("gemma",), called=r"gemma-\d+b", gain_less_one=True)
# Gemma 2 and 3 norm what attention and MLP write; the residual stream receives the normed tensors.
_GEMMA_2 = replace(
    _GEMMA,
    names=("gemma2",),
    called=r"gemma-2(?!\d*b)",
    streams={
        **_LLAMA.streams,
        "resid_mid": Tap("pre_feedforward_layernorm", "in"),
        "attn_out": Tap("post_attention_layernorm", "out"),
        "mlp_out": Tap("post_feedforward_layernorm", "out"),
    },
    mlp_norm="pre_feedforward_layernorm",
    logit_cap="final_logit_softcapping",
)
# Experts share no one matrix inside; layers of linear attention have no heads to read side by side.
_EXPERTS = replace(_LLAMA, names=("qwen3_moe",), called=r"qwen3-", streams=_without(_LLAMA.streams, "mlp_post"))
_QWEN_3_5 = replace(_LLAMA, called=None, gain_less_one=True)

_RECORDS = (
    _LLAMA,
    replace(_LLAMA, names=("mistral",), called=r"mistral"),
    replace(_LLAMA, names=("qwen2",), called=r"qwen2"),
    replace(_LLAMA, names=("qwen3",), called=r"qwen3-"),
    _EXPERTS,
    replace(_QWEN_3_5, names=("qwen3_5_text",), streams=_without(_LLAMA.streams, "attn_out", "attn_z")),
    replace(_QWEN_3_5, names=("qwen3_5_moe_text",), streams=_without(_EXPERTS.streams, "attn_out", "attn_z")),
    replace(_LLAMA, names=("phi3",), called=None, projections=("qkv_proj",)),
    _GEMMA,
    _GEMMA_2,
    replace(_GEMMA_2, names=("gemma3", "gemma3_text"), called=r"gemma-3(?!\d*b)"),
    Family(
        names=("gpt2",),
        called=r"gpt2",
        streams=_taps("attn", "c_proj", "mlp", "c_proj", "ln_2"),
        attention_norm="ln_1",
        mlp_norm="ln_2",
        projections=("c_attn",),
        final_norm="ln_f",
        layer_norms=True,
        positions="wpe",
    ),
    Family(
        names=("gpt_neox",),
        called=r"pythia",
        streams=_taps("attention", "dense", "mlp", "dense_4h_to_h"),
        sequential={"resid_mid": Tap("post_attention_layernorm", "in")},
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        projections=("query_key_value",),
        by_head=True,
        final_norm="final_layer_norm",
        layer_norms=True,
    ),
    Family(
        names=("phi",),
        called=r"phi-[12]",
        streams=_taps("self_attn", "dense", "mlp", "fc2"),
        attention_norm="input_layernorm",
        mlp_norm="input_layernorm",
        final_norm="final_layernorm",
        layer_norms=True,
    ),
    replace(
        _LLAMA,
        names=("nanochat",),
        called=None,
        streams=_taps("self_attn", "o_proj", "mlp", "fc2", "post_attention_layernorm"),
        final_norm=None,
        logit_cap="final_logit_softcapping",
    ),
)
FAMILIES: dict[str, Family] = {name: family for family in _RECORDS for name in family.names}
"""By `model_type`."""

NANOCHAT_GPT = _taps("attn", "c_proj", "mlp", "c_proj")
"""The streams of nanochat's own GPT, no model of transformers. Its norms are functions: no module reads resid_mid."""

RESIDUAL: dict[Stream, Tap] = {"resid_post": Tap("", "out")}
"""What every family has."""


def family_of(model_type: str) -> Family:
    """The record of a family.

    Args:
        model_type: of a model's text config.

    Raises:
        ConfigError: if there is none.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model family {model_type!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def streams_of(config: Any) -> dict[Stream, Tap]:
    """The streams of a model by its transformers text config; errors as in `family_of`."""
    family = family_of(config.model_type)
    if family.sequential is None or getattr(config, "use_parallel_residual", True):
        return dict(family.streams)
    return {**family.streams, **family.sequential}


def with_layer_norms() -> tuple[str, ...]:
    """The families whose every reader of the residual stream is a LayerNorm."""
    return tuple(name for name, family in FAMILIES.items() if family.layer_norms)
