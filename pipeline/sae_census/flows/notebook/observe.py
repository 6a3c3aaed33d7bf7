"""Observe: what the features of an SAE say about single prompts, before anybody intervenes.

Nothing here steers, generates or changes a model: hooks read one tensor and are gone afterwards. The model and the
tokenizer are the caller's own, as transformers loads them; models in training mode are read as they are, dropout
included.
"""

from collections.abc import Sequence
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sae_census.compute.notebook.prompts import (
    FeatureRanking,
    PromptCodes,
    SetSums,
    differential_features,
    fire_rate,
    pretty_ranking,
    scan_prompts_for_feature,
    strongest_features,
)
from sae_census.compute.numbers.codes import Codes, empty, sorted_codes
from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ConfigError
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.checkpoints.nanochat import canonical
from sae_census.io.loading.soundness import check_ids
from sae_census.io.model.families import RESIDUAL, streams_of
from sae_census.io.model.hooks import Captures, blocks_of, capture_residual, max_positions
from sae_census.steps.model.demands import centring_of
from sae_census.types import HookPoint

_log = getLogger(__name__)

__all__ = [
    "FeatureRanking",
    "PromptCodes",
    "SetSums",
    "capture_residual",
    "differential_features",
    "encode_prompts",
    "fire_rate",
    "observe_prompts",
    "pretty_ranking",
    "scan_prompts_for_feature",
    "top_features_for_prompt",
]


def encode_prompts(
    model: nn.Module,
    tokenizer: Any,
    sae: Any,
    prompts: Sequence[str],
    layer_idx: int,
    *,
    apply_chat_template: bool = False,
    batch_size: int = 32,
) -> Tensor:
    """The codes of the last token of each prompt as a dense tensor; `observe_prompts` keeps them sparse.

    Args:
        model: as of `observe_prompts`.
        tokenizer: of that model.
        sae: as of `observe_prompts`.
        prompts: P texts.
        layer_idx: the block whose output is read.
        apply_chat_template: put each prompt into the chat template as one user's message.
        batch_size: prompts of one forward pass.

    Returns:
        (P, F) float32 on the CPU, row i for prompt i, in the SAE's own unit; 0 where nothing fired.

    >>> tuple(encode_prompts(model.inner, tokenizer, sae, ["river water", "sugar"], layer_idx=1).shape)
    (2, 96)

    Raises:
        ValueError: as `observe_prompts`.
        ConfigError: as `observe_prompts`.
    """
    return observe_prompts(
        model, tokenizer, sae, prompts, layer_idx, apply_chat_template=apply_chat_template, batch_size=batch_size
    ).dense()


def top_features_for_prompt(
    model: nn.Module,
    tokenizer: Any,
    sae: Any,
    prompt: str,
    layer_idx: int,
    top_n: int = 10,
    *,
    apply_chat_template: bool = False,
) -> list[FeatureRanking]:
    """The features with the largest codes on the last token of a prompt.

    Args:
        model: as of `observe_prompts`.
        tokenizer: of that model.
        sae: as of `observe_prompts`.
        prompt: one text.
        layer_idx: the block whose output is read.
        top_n: at most this many features.
        apply_chat_template: put the prompt into the chat template as one user's message.

    Returns:
        Features whose code is not 0, by code, largest first; ties by id.

    >>> found = top_features_for_prompt(model.inner, tokenizer, sae, "river water", layer_idx=1, top_n=3)
    >>> len(found), found[0].score >= found[1].score
    (3, True)

    Raises:
        ValueError: if the prompt has no tokens.
        ConfigError: as `observe_prompts`.
    """
    seen = observe_prompts(model, tokenizer, sae, [prompt], layer_idx, apply_chat_template=apply_chat_template)
    return strongest_features(seen.codes, top_n)


def observe_prompts(
    model: nn.Module,
    tokenizer: Any,
    sae: Any,
    prompts: Sequence[str],
    layer_idx: int,
    *,
    apply_chat_template: bool = False,
    batch_size: int = 32,
) -> PromptCodes:
    """The signed codes of the last token of each prompt.

    Prompts run side by side, right-padded, in order of their lengths. With a float32 model, codes agree with those
    of one prompt at a time to 1e-4 of the largest code; a bfloat16 model rounds by the shape of a batch, to about a
    tenth of it. At the edge of a gate a code may then be there or not. `batch_size=1` runs one prompt at a time.

    Args:
        model: a decoder with a transformers config.
        tokenizer: of that model; its padding side and padding token do not matter.
        sae: as from `load_sae`, in canonical form, or any object whose `encode(h)` gives the codes (N, F) of (N, D).
        prompts: texts, tokenized as the tokenizer does by itself; one that brings its own BOS gets no second.
        layer_idx: the block whose output is read, or whose stream, if the SAE says that it belongs to another.
        apply_chat_template: put each prompt as one user's message into the chat template, and let the assistant's
            turn begin.
        batch_size: prompts of one forward pass.

    Returns:
        The codes of P prompts over F features, sparse, in the SAE's own unit, with what they were read from.

    >>> seen = observe_prompts(model.inner, tokenizer, sae, ["river water", "sugar"], layer_idx=1)
    >>> tuple(seen.shape)
    (2, 96)
    >>> tokenizer.decode(seen.last_token_ids[:1])  # of the small vocabulary, the end of "water"
    'er'

    Raises:
        ValueError: if a prompt has no tokens or more than the model has positions, or an activation is NaN or infinite,
            by the prompt's index.
        ConfigError: if the SAE belongs to another layer or is not as wide as the activations, or a prompt has a token
            that the model does not know.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; expected a sequence of them")
    point, encoder = _site(sae, layer_idx)
    if isinstance(sae, LoadedSae) and (found := centring_of(sae, model)):
        _log.warning("%s: %s", point, found.text)
    ids = _token_ids(tokenizer, prompts, apply_chat_template)
    num_embeddings = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # nn.Module types it a tensor
    for row in ids:
        check_ids(int(row.max()), num_embeddings, lambda: len(tokenizer), lambda token: tokenizer.decode([token]))
    _check_lengths(model, ids)
    codes, num_features = empty(), encoder.num_features if isinstance(encoder, SparseAutoencoder) else 0
    if ids:
        x = _last_activations(model, ids, point, batch_size)
        with torch.inference_mode():
            if isinstance(encoder, SparseAutoencoder):
                codes = _encode(encoder, x, point)
            else:
                codes, num_features = _encode_elsewhere(encoder, x)
    return PromptCodes(
        codes=codes,
        num_prompts=len(ids),
        num_features=num_features,
        hook_point=str(point),
        last_token_ids=np.array([int(row[-1]) for row in ids], np.int64),
        apply_chat_template=apply_chat_template,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _site(sae: Any, layer_idx: int) -> tuple[HookPoint, Any]:
    """Where an SAE reads, and what encodes: itself in canonical form, or the object as it is."""
    if isinstance(sae, LoadedSae):
        if sae.hook_point.layer != layer_idx:
            raise ConfigError(f"layer_idx is {layer_idx}, but the SAE {sae.name} belongs to {sae.hook_point}")
        return sae.hook_point, sae.sae
    if isinstance(sae, torch.nn.Module) and hasattr(sae, "get_feature_activations"):
        sae = canonical(sae)  # nanochat's add-on, whose encode gives what the gate has not seen yet
    if not isinstance(sae, SparseAutoencoder) and not callable(getattr(sae, "encode", None)):
        raise TypeError(
            f"sae is a {type(sae).__name__}; expected what load_sae returns, or its .sae, or an object with encode(h)"
        )
    return HookPoint(layer_idx, "resid_post"), sae


def _encode(sae: SparseAutoencoder, x: Tensor, point: HookPoint) -> Codes:
    if x.shape[1] != sae.width:
        raise ConfigError(
            f"the SAE is {sae.width} wide, but {point} of this model is {x.shape[1]} wide; is it the SAE of another "
            "model or hook point?"
        )
    return sae.encode(x.to(sae.w_enc.device)[:, None], signed=True)


def _encode_elsewhere(sae: Any, x: Tensor) -> tuple[Codes, int]:
    """The codes of an object with `encode(h)`, which takes (N, D) and gives (N, F); and F."""
    weight = next(iter(sae.parameters()), x) if isinstance(sae, nn.Module) else x.float()
    z = sae.encode(x.to(weight.device, weight.dtype))
    if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != len(x):
        got = tuple(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise ValueError(f"encode of {type(sae).__name__} gave {got} for {tuple(x.shape)}; expected a tensor (N, F)")
    z = z.to_dense().float().cpu() if z.layout != torch.strided else z.float().cpu()
    if not torch.isfinite(z).all():
        raise ValueError(f"encode of {type(sae).__name__} gave NaN or infinite codes")
    row, feature = z.nonzero(as_tuple=True)
    codes = sorted_codes(feature.int().numpy(), row.numpy(), z[row, feature].numpy(), num_positions=1)
    return codes, z.shape[1]


def _check_lengths(model: Any, ids: Sequence[Tensor]) -> None:
    most = max_positions(model)
    for index, row in enumerate(ids):
        if most and len(row) > most:
            raise ValueError(f"prompt {index} has {len(row)} tokens, but the model has {most} positions")


def _token_ids(tokenizer: Any, prompts: Sequence[str], apply_chat_template: bool) -> list[Tensor]:
    """The ids of each prompt by itself, so that nothing is padded or cut."""
    found = []
    for index, prompt in enumerate(prompts):
        if apply_chat_template:
            messages = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            encoded = tokenizer(prompt, return_tensors="pt")
        ids: Tensor = _one_bos(tokenizer, prompt, encoded["input_ids"][0])
        if not len(ids):
            raise ValueError(f"prompt {index} ({prompt!r}) has no tokens, so it has no last one")
        found.append(ids)
    return found


def _one_bos(tokenizer: Any, prompt: str, ids: Tensor) -> Tensor:
    """The ids of a prompt without the BOS that the tokenizer put before one that the prompt brought."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or ids[:2].tolist() != [bos, bos]:
        return ids
    brought = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids[1:] if len(brought) < len(ids) and brought[:1] == [bos] else ids


def _last_activations(model: Any, ids: Sequence[Tensor], point: HookPoint, batch_size: int) -> Tensor:
    """The activation (P, D) at the last token of each prompt.

    Ids of one batch are padded on the right: attention is causal, so what fills a row reaches no real token, and
    positions count from the first real one.
    """
    taps = RESIDUAL if point.stream in RESIDUAL else streams_of(model.config.get_text_config())
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    found: dict[int, Tensor] = {}
    with Captures(blocks_of(model), taps, [point]) as captures:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = torch.zeros((len(chosen), len(ids[chosen[-1]])), dtype=torch.long)
            for row, index in enumerate(chosen):
                batch[row, : len(ids[index])] = ids[index]
            x = captures.run(model, batch.to(model.device))[point]
            for row, index in enumerate(chosen):
                found[index] = x[row, len(ids[index]) - 1].clone()
                if not torch.isfinite(found[index]).all():
                    raise ValueError(f"activations of prompt {index} at {point} are NaN or infinite")
    return torch.stack([found[index] for index in range(len(ids))])
