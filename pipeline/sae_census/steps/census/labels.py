"""The words of a range's spans, counted for its proto-labels."""

import numpy as np

from sae_census.compute.census import labels
from sae_census.compute.census.words import SpanTokens
from sae_census.io.store import tables
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.census.spans import SpanAddresses, take_ranges


def tally(
    addresses: SpanAddresses, spans: tables.Table, tokenizer: Tokenizer, num_groups: int, num_features: int
) -> labels.Tally:
    """Count the words of spans, one that is in several groups once.

    Args:
        addresses: of every row of `spans`, with features from 0.
        spans: rows of `spans.parquet`.
        tokenizer: of their tokens.
        num_groups: the groups below are counted.
        num_features: of the range.
    """
    contexts, context = np.unique(addresses.shard.astype(np.int64) << 32 | addresses.row, return_inverse=True)
    counted = np.flatnonzero(addresses.group < num_groups)
    address = (addresses.feature * len(contexts) + context) << 24 | addresses.position
    chosen = counted[np.unique(address[counted], return_index=True)[1]]
    row_start, token_ids = tables.ragged(spans, "token_ids")
    flat, start = take_ranges(row_start[:-1][chosen], row_start[1:][chosen])
    occurs = np.bincount(token_ids[flat]) > 0
    tokens = SpanTokens(
        feature=addresses.feature[chosen],
        context=context[chosen],
        peak=addresses.position[chosen] - np.asarray(spans["start"]).astype(np.int64)[chosen],
        start=start,
        token=(np.cumsum(occurs) - 1)[token_ids[flat]],
    )
    return labels.tally(tokens, tokenizer.tokens(np.flatnonzero(occurs).tolist()), num_features)
