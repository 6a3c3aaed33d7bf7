"""Codes that somebody else's encoder returns as a dense tensor, made sparse without a second dense tensor."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_census.compute.numbers.codes import Codes, sorted_codes
from sae_census.errors import ShardError


def sparse_codes(dense: Float[Tensor, "B T F"] | Float[Tensor, "B T H F"], counted: Bool[Tensor, "B T"]) -> Codes:
    """The positive codes of counted tokens; with heads, the greatest over the heads. Nothing is changed in place.

    Args:
        dense: what `encode` returned; at tokens that are not counted it may be anything, NaN included.
        counted: which tokens count.

    Raises:
        ShardError: if a code of a counted token is NaN or infinite.
    """
    parts = []
    for row, (acts, counts) in enumerate(zip(dense, counted.to(dense.device), strict=True)):
        position = counts.nonzero()[:, 0]
        kept = acts[position].float()
        if not torch.isfinite(kept).all():
            raise ShardError(f"the SAE's codes are NaN or infinite in context {row} of a batch; expected finite codes")
        kept = kept.amax(dim=1) if kept.ndim == 3 else kept
        token, feature = (kept > 0).nonzero(as_tuple=True)
        parts.append((feature.to(torch.int32), position[token] + row * dense.shape[1], kept[token, feature]))
    feature, token, value = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return sorted_codes(feature, token.astype(np.int64), value, num_positions=dense.shape[1])
