"""Sum the traces of a feature over its spans: which heads, MLPs and source tokens it comes from."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae_census.io.report import Cell, Grid, Line, Section

Row = Mapping[str, Any]
PARTS = ("embed", "position", "head", "mlp", "bias", "intercept")
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A part of a model, or a source token, and what it brings a feature."""

    label: str
    mean: float
    """Its contribution, averaged over the traced spans; 0 where it is absent."""
    num_spans: int
    """In how many of them it is present."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Where one feature comes from, over its traced spans; everything largest first, whatever the sign."""

    hook_point: str
    sae: str
    feature_id: int
    num_spans: int
    pre_activation: float
    """Averaged over the spans."""
    parts: tuple[Origin, ...]
    """Embedding, heads, MLPs, biases; their means add up to `pre_activation`."""
    sources: tuple[Origin, ...]
    """Tokens that heads read, by text; the traced token itself apart. Their means add up to those of all heads."""
    pairs: tuple[Origin, ...]
    """Heads with the token they read, as far as they are among the strongest pairs of a span."""


def origins(rows: Sequence[Row]) -> Origins:
    """Sum the rows of `sources.parquet` of one feature."""
    spans = {_span(row): row["pre_activation"] for row in rows}
    return Origins(
        hook_point=rows[0]["hook_point"],
        sae=rows[0]["sae"],
        feature_id=rows[0]["feature_id"],
        num_spans=len(spans),
        pre_activation=sum(spans.values()) / len(spans),
        parts=_summed(rows, PARTS, len(spans)),
        sources=_summed(rows, ("source",), len(spans)),
        pairs=_summed(rows, ("head_source",), len(spans)),
    )


def _span(row: Row) -> tuple[str, int]:
    return row["group"], row["sample_rank"]


def _summed(rows: Sequence[Row], kinds: Sequence[str], num_spans: int) -> tuple[Origin, ...]:
    totals: dict[str, float] = defaultdict(float)
    seen: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for row in rows:
        if row["kind"] in kinds:
            label = label_of(row)
            totals[label] += row["contribution"]
            seen[label].add(_span(row))
    every = [Origin(label=k, mean=total / num_spans, num_spans=len(seen[k])) for k, total in totals.items()]
    return tuple(sorted(every, key=lambda origin: (-abs(origin.mean), origin.label)))


def label_of(row: Row) -> str:
    """What people call a row of `sources.parquet`."""
    layer, head = row["layer"], row["head"]
    token = "itself" if row["source_position"] == row["position"] else repr(row["source_token"])
    match row["kind"]:
        case "embed":
            return "embedding"
        case "head":
            return f"head {layer}.{head}"
        case "mlp":
            return f"MLP {layer}"
        case "bias":
            return "bias of the SAE" if layer is None else f"bias of attention {layer}"
        case "source":
            return token
        case "head_source":
            return f"head {layer}.{head} from {token}"
        case other:
            return str(other)


def section(one: Origins, rows: Sequence[Row]) -> Section:
    """A feature on the page: its origins, then each span with what heads brought from every token.

    Args:
        one: of the feature.
        rows: its rows of `sources.parquet`.
    """
    spans: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        spans[_span(row)].append(row)
    return Section(
        title=f"{one.hook_point}  {one.sae}  feature {one.feature_id}",
        note=f"{one.num_spans} spans, mean pre-activation {one.pre_activation:.4g}",
        tables=(
            _grid("Parts", one.parts),
            _grid("Source tokens, all heads", one.sources),
            _grid("Head and source token", one.pairs),
        ),
        lines=tuple(_line(group, rank, mine) for (group, rank), mine in spans.items()),
    )


def _grid(caption: str, found: Sequence[Origin]) -> Grid:
    most = max((abs(origin.mean) for origin in found), default=1.0) or 1.0
    return Grid(
        caption=caption,
        header=("", "mean", "spans"),
        rows=tuple(
            (
                Cell(text=origin.label),
                Cell(text=f"{origin.mean:+.3f}", shade=origin.mean / most),
                Cell(text=str(origin.num_spans)),
            )
            for origin in found[:_SHOWN]
        ),
    )


def _line(group: str, rank: int, rows: Sequence[Row]) -> Line:
    first = rows[0]
    tokens = [row for row in rows if row["kind"] == "source"]
    most = max((abs(row["contribution"]) for row in tokens), default=1.0) or 1.0
    return Line(
        caption=(
            f"{group} {rank}: code {first['value']:.4g}, pre-activation {first['pre_activation']:.4g}; "
            f"shard {first['shard_id']}, context {first['context_id']}, position {first['position']}"
        ),
        tokens=tuple(
            Cell(
                text=row["source_token"],
                shade=row["contribution"] / most,
                hint=f"{row['source_position']}: {row['contribution']:+.3f}",
            )
            for row in tokens
        ),
        peak=first["position"],
    )
