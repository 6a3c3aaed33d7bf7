"""The tables of the project, column by column; all but shards and sweeps begin with the key of a feature."""

import pyarrow as pa

_KEY = [pa.field("hook_point", pa.string()), pa.field("sae", pa.string()), pa.field("feature_id", pa.int32())]

SHARD = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("document_id", pa.list_(pa.string())),
        pa.field("document_start", pa.list_(pa.int32())),
        pa.field("slice", pa.string()),
    ]
)
FEATURES = pa.schema(
    [
        *_KEY,
        pa.field("layer", pa.int32()),
        pa.field("stream", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float64()),
        pa.field("count", pa.int64()),
        pa.field("tokens_counted", pa.int64()),
        pa.field("frequency", pa.float64()),
        pa.field("context_count", pa.int64()),
        pa.field("context_frequency", pa.float64()),
        pa.field("mean", pa.float64()),
        pa.field("mean_when_firing", pa.float64()),
        pa.field("std", pa.float64()),
        pa.field("max", pa.float64()),
        pa.field("p50", pa.float64()),
        pa.field("p95", pa.float64()),
        pa.field("p99", pa.float64()),
        pa.field("dead", pa.bool_()),
        pa.field("proto_label", pa.string()),
        pa.field("label", pa.string()),
        pa.field("decoder_norm", pa.float64()),
    ]
)
SLICES = pa.schema(
    [
        *_KEY,
        pa.field("slice", pa.string()),
        pa.field("count", pa.int64()),
        pa.field("tokens_counted", pa.int64()),
        pa.field("frequency", pa.float64()),
        pa.field("sum", pa.float64()),
        pa.field("mean_when_firing", pa.float64()),
        pa.field("max", pa.float64()),
    ]
)
SPANS = pa.schema(
    [
        *_KEY,
        pa.field("group", pa.string()),
        pa.field("sample_rank", pa.int32()),
        pa.field("shard_id", pa.string()),
        pa.field("context_id", pa.int32()),
        pa.field("document_id", pa.string()),
        pa.field("slice", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("start", pa.int32()),
        pa.field("stop", pa.int32()),
        pa.field("value", pa.float32()),
        # Joined, the tokens are the text; a character of several tokens stands at the last, the others are empty.
        pa.field("text", pa.string()),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("values", pa.list_(pa.float32())),
    ]
)
FOUND = pa.schema(
    [
        *_KEY,
        pa.field("layer", pa.int32()),
        pa.field("stream", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float64()),
        pa.field("mean", pa.float64()),
        pa.field("coverage", pa.float64()),
        pa.field("max", pa.float64()),
        pa.field("selectivity", pa.float64()),
        pa.field("tau", pa.float64()),
        pa.field("proto_label", pa.string()),
        pa.field("label_source", pa.string()),
        pa.field("top_span_text", pa.string()),
        pa.field(
            "top_spans",
            pa.list_(
                pa.struct(
                    [
                        pa.field("text", pa.string()),
                        pa.field("position", pa.list_(pa.int32())),
                        pa.field("act", pa.float64()),
                        pa.field("peak", pa.int32()),
                        pa.field("tokens", pa.list_(pa.string())),
                        pa.field("values", pa.list_(pa.float64())),
                    ]
                )
            ),
        ),
        pa.field("line", pa.int64()),
        pa.field("id", pa.string()),
    ]
)
SWEEPS = pa.schema(
    [
        pa.field("entry", pa.string()),
        pa.field("started_at", pa.timestamp("us", tz="UTC")),
        pa.field("finished_at", pa.timestamp("us", tz="UTC")),
        pa.field("status", pa.string()),
        pa.field("catalog", pa.string()),
        pa.field("snapshot", pa.int32()),
        pa.field("digest", pa.string()),
        pa.field("message", pa.string()),
        pa.field(
            "statistics",
            pa.list_(pa.struct([pa.field("statistic", pa.string()), pa.field("value", pa.float64())])),
        ),
        pa.field("alerts", pa.list_(pa.string())),
    ]
)
LOGITS = pa.schema(
    [
        *_KEY,
        pa.field("sign", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("token_id", pa.int32()),
        pa.field("token", pa.string()),
        pa.field("logit", pa.float32()),
    ]
)
LOGIT_MOMENTS = pa.schema([*_KEY, *(pa.field(name, pa.float64()) for name in ("mean", "std", "skewness", "kurtosis"))])
SOURCES = pa.schema(
    [
        *_KEY,
        pa.field("group", pa.string()),
        pa.field("sample_rank", pa.int32()),
        pa.field("shard_id", pa.string()),
        pa.field("context_id", pa.int32()),
        pa.field("position", pa.int32()),
        pa.field("value", pa.float32()),
        pa.field("pre_activation", pa.float64()),
        pa.field("kind", pa.string()),
        pa.field("layer", pa.int32()),
        pa.field("head", pa.int32()),
        pa.field("source_position", pa.int32()),
        pa.field("source_token", pa.string()),
        pa.field("contribution", pa.float64()),
    ]
)
_SIDES = ("a", "b")
COMPARISON = pa.schema(
    [
        *_KEY,
        pa.field("rank_a", pa.int32()),
        pa.field("rank_b", pa.int32()),
        *(pa.field(f"count_{side}", pa.int64()) for side in _SIDES),
        *(pa.field(f"documents_{side}", pa.int64()) for side in _SIDES),
        *(
            pa.field(f"{name}_{side}", pa.float64())
            for name in ("frequency", "mean", "mean_when_firing")
            for side in _SIDES
        ),
        *(
            pa.field(f"{name}_{part}", pa.float64())
            for name in ("frequency", "mean")
            for part in ("difference", "low", "high", "p", "q")
        ),
        *(
            pa.field(f"{name}{part}", pa.float64())
            for name in ("log_odds", "effect_size")
            for part in ("", "_low", "_high")
        ),
        pa.field("histogram_distance", pa.float64()),
        pa.field("histogram_shift", pa.float64()),
    ]
)
_WHEN = ("old", "new")
DIFF = pa.schema(
    [
        *_KEY,
        pa.field("change", pa.string()),
        *(pa.field(f"dead_{when}", pa.bool_()) for when in _WHEN),
        *(pa.field(f"rank_{when}", pa.int32()) for when in _WHEN),
        *(pa.field(f"{name}_{when}", pa.float64()) for name in ("score", "frequency", "mean") for when in _WHEN),
        *list(COMPARISON)[len(_KEY) :],
    ]
)
"""Columns of a comparison stand for the text after (a) and before (b)."""
ABLATIONS = pa.schema(
    [
        *_KEY,
        pa.field("group", pa.string()),
        pa.field("spans", pa.int32()),
        pa.field("code", pa.float64()),
        pa.field("code_deviation", pa.float64()),
        *(
            pa.field(f"{which}{what}_change{end}", pa.float64())
            for what in ("loss", "logit")
            for which in ("", "control_", "excess_")
            for end in ("", "_low", "_high")
        ),
        pa.field("loss_spans", pa.int32()),
        pa.field("logit_spans", pa.int32()),
        pa.field("confidence", pa.float64()),
        pa.field("top_tokens", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("catalog_digest", pa.string()),
        pa.field("dtype", pa.string()),
    ]
)
