"""The tangent plane of one feature at one token: which tokens, vocabulary items and heads excite it.

For SAEs in or behind an MLP, and in the residual stream. The function that is linearised goes from the residual
stream before the MLP to the feature's pre-activation, norms included; its gradient is what everything else is
read with.

A tangent at one point is a poor model elsewhere: `quality` says how poor. Behind a norm the gradient is
orthogonal to the point itself (a norm ignores length), so the activation score of the very token that was
linearised is about 0: compare scores with each other, never with activations. `tangent estimates` are on the
scale of pre-activations.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_census.compute.effects import tangent
from sae_census.compute.effects.linear import Attention
from sae_census.compute.numbers.codes import Codes, concatenate
from sae_census.errors import ConfigError
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.model.paths import Paths
from sae_census.types import HookPoint

_CONTEXTS = 16
READ_OUTS = ("OV", "ln+OV", "QK")


class SparseActivations:
    """Codes of a batch that read like the dense array (tokens, F); only what is asked for is made dense."""

    def __init__(self, codes: Codes, num_contexts: int, num_positions: int, num_features: int):
        self._codes = codes
        self._token = torch.from_numpy(codes.row.astype(np.int64) * num_positions + codes.position)
        self.shape = (num_contexts * num_positions, num_features)

    def __getitem__(self, key: tuple[Any, int]) -> Tensor:
        """`[rows, feature]`: the codes of one feature at some tokens (`:` for all), zeros included, float32."""
        rows, feature = key
        feature = range(self.shape[1])[feature]
        start, stop = np.searchsorted(self._codes.feature, [feature, feature + 1])
        column = torch.zeros(self.shape[0])
        column[self._token[start:stop]] = torch.from_numpy(self._codes.value[start:stop])
        return column[rows]


def analyze_linearized_feature(
    feature_idx: int,
    sample_idx: int,
    token_idx: int,
    model: LanguageModel,
    data: Tensor,
    encoder: LoadedSae,
    batch_size: int,
    n_tokens: int = 10,
) -> dict[str, Any]:
    """Linearise a feature at one token, and read batch, vocabulary and attention with its gradient.

    N tokens of the batch in the order of contexts, then positions; D d_model, V vocabulary, H heads. The gradient
    comes from the one context `data[sample_idx]`, which need not be in the batch.

    Args:
        feature_idx: of `encoder`.
        sample_idx: the context, and
        token_idx: the token in it, at which to linearise.
        model: in float32.
        data: (contexts, T) token ids.
        encoder: an SAE with its hook point, not inside attention.
        batch_size: for how many contexts, from the first, tokens are scored.
        n_tokens: length of the lists of vocabulary items.

    Returns:
        - `feature`: the encoder's direction, as wide as the SAE's input; `mid` (D,): the gradient; `pre-activation`:
          at the token;
        - `sae activations` (N, F): codes, kept sparse: `[:, f]` is dense; `pre-activations` (N,): the truth that
          `tangent estimates` (N,) estimate; `quality`: rank correlation and sign agreement of the two;
        - `activation scores` (N,): the stream times `mid`, the linear part alone;
        - `tokens` (V,): what the embedding of each vocabulary item, on the direct path, adds to the feature;
          `token scores` and `token strings`: the best n_tokens. This is the input side, no unembedding;
        - `attention layer`: the last block whose attention writes to the linearised stream, None if there is none.
          `direct path` (T,), `head contributions` (H, T, T) by query and source token of the context with the
          pattern fixed, and `attention bias` (T,) add up to the stream times `mid` at every query;
        - `OV unembed` (H, V): W_E W_V W_O mid; `ln+OV unembed` (H, V): the same with the block's norm applied to
          each embedding, as attention reads it; `QK unembed` (H, V): W_E W_Q W_K^T mid, the content by which a
          token asks for a key that carries `mid` (distance 0; without biases and norms of queries and keys), which
          means something only where `mid` is read at the key. Positional embeddings are in none of them. Of each,
          `… token scores` (H, n_tokens) and `… token strings`.

    >>> tokens = tokenizer("river water stone bridge", return_tensors="pt").input_ids
    >>> found = analyze_linearized_feature(42, 0, 3, model, tokens, sae, batch_size=1, n_tokens=5)
    >>> tuple(found["mid"].shape), len(found["token strings"])
    ((32,), 5)

    Raises:
        ConfigError: if the model computes in half precision, the SAE sits inside attention, or an index is out of
            range, or an id beyond the embedding.
    """
    data = torch.as_tensor(data)
    model.check_ids(data)
    paths, point = Paths(model.inner), encoder.hook_point
    _check(paths, encoder, data, feature_idx, sample_idx, token_idx, batch_size)
    sae = encoder.sae.to(model.device)
    base = paths.base_of(point)
    assert base is not None
    layer = base.layer - (base.stream == "resid_pre")
    wrote = [HookPoint(layer, "attn_out")] if layer >= 0 else []
    readings = paths.read(data[sample_idx], [point, *wrote], range(data.shape[1]))
    stream = readings.streams[base]
    tail = paths.tail(point)
    value, mid = tangent.slope(lambda x: sae.pre_activations(tail(x), feature_idx), stream[token_idx])

    embedding = paths.embedding_rows()
    read = mid.to(paths.dtype)
    result: dict[str, Any] = {"feature_idx": feature_idx, "feature": sae.w_enc[:, feature_idx], "mid": read}
    result["pre-activation"] = value
    result |= _over_batch(model, encoder, base, data[:batch_size], feature_idx, mid)
    estimates = result["activation scores"] + (value - float(stream[token_idx].double() @ mid))
    result["tangent estimates"] = estimates
    result["quality"] = tangent.quality(estimates.numpy(), result["pre-activations"].numpy())
    result["tokens"] = embedding @ read
    result |= _best(model, "token", result["tokens"], n_tokens)
    result["attention layer"] = layer if wrote else None
    if wrote:
        attention = readings.writes.attention[layer]
        result["direct path"] = ((stream - readings.streams[wrote[0]]).double() @ mid).cpu()
        result |= _by_head(attention, mid)
        for name, scores in zip(READ_OUTS, _read_outs(paths, layer, attention, mid, token_idx, embedding), strict=True):
            result[f"{name} unembed"] = scores
            result |= _best(model, f"{name} token", scores, n_tokens)
    return result


def _check(
    paths: Paths, encoder: LoadedSae, data: Tensor, feature_idx: int, sample_idx: int, token_idx: int, batch_size: int
) -> None:
    if paths.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"linearising needs a model in float32, this one computes in {paths.dtype}")
    if paths.base_of(encoder.hook_point) is None:
        raise ConfigError(f"{encoder.hook_point} is inside attention, which mixes tokens; use trace_feature instead")
    if data.ndim != 2 or data.is_floating_point():
        raise ConfigError(f"data has shape {tuple(data.shape)}; expected token ids, (contexts, tokens)")
    bounds = {
        "feature_idx": (feature_idx, encoder.sae.num_features),
        "sample_idx": (sample_idx, data.shape[0]),
        "token_idx": (token_idx, data.shape[1]),
        "batch_size - 1": (batch_size - 1, data.shape[0]),
    }
    for name, (index, stop) in bounds.items():
        if not 0 <= index < stop:
            raise ConfigError(f"{name} is {index}; expected 0 to {stop - 1}")


def _over_batch(
    model: LanguageModel, encoder: LoadedSae, base: HookPoint, batch: Tensor, feature_idx: int, mid: Tensor
) -> dict[str, Any]:
    """Codes, true pre-activations and scores of every token, a few contexts at a time."""
    point, sae = encoder.hook_point, encoder.sae.to(model.device)
    scores, truth, codes = [], [], []
    with model.captures({point, base}) as captures:
        for first in range(0, len(batch), _CONTEXTS):
            got = model.run(captures, batch[first : first + _CONTEXTS])
            scores.append((got[base].double() @ mid).flatten().cpu())
            truth.append(sae.pre_activations(got[point].flatten(0, 1), feature_idx).double().cpu())
            codes.append(sae.encode(got[point], first))
    num_contexts, num_positions = batch.shape
    joined = concatenate(codes, num_positions)
    return {
        "sae activations": SparseActivations(joined, num_contexts, num_positions, sae.num_features),
        "pre-activations": torch.cat(truth),
        "activation scores": torch.cat(scores),
    }


def _best(model: LanguageModel, name: str, scores: Tensor, n_tokens: int) -> dict[str, Any]:
    """The highest scores of each row of (…, V), and their tokens."""
    best = tangent.strongest(scores, n_tokens)
    words = model.tokenizer.tokens(best.flatten().tolist())
    strings = words if scores.ndim == 1 else [words[i : i + n_tokens] for i in range(0, len(words), n_tokens)]
    return {f"{name} scores": scores.gather(-1, best), f"{name} strings": strings}


def _by_head(attention: Attention, mid: Tensor) -> dict[str, Tensor]:
    brought, bias = [], []
    for query in range(attention.pattern.shape[1]):
        heads, of_output = attention.pull(mid, query)
        by_source, of_values = attention.contributions(heads, query)
        brought.append(by_source)
        bias.append(of_output + of_values)
    return {"head contributions": torch.stack(brought, dim=1).cpu(), "attention bias": torch.tensor(bias).double()}


def _read_outs(
    paths: Paths, layer: int, attention: Attention, mid: Tensor, query: int, embedding: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(H, V) each, as `READ_OUTS` names them."""
    w_q, w_k, w_v = (matrix.double() for matrix in paths.head_matrices(layer))
    heads, _ = attention.pull(mid, query)
    ov = torch.einsum("hde,he->hd", w_v, heads).to(paths.dtype)
    qk = torch.einsum("hde,hke,k->hd", w_q, w_k, mid).to(paths.dtype)
    return ov @ embedding.T, ov @ paths.blocks[layer].attention_norm(embedding).T, qk @ embedding.T
