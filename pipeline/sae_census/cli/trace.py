"""`sae-census trace catalog.name=…`: where features of a catalog come from, at their spans."""

import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console
from sae_census.config import TraceConfig
from sae_census.flows.effects.origins import Origin, Origins
from sae_census.flows.effects.trace import Tracing, trace

_FEATURES = 20
_SHOWN = 6


def job(config: TraceConfig) -> int:
    """Run the flow and show what came out."""
    tracing = trace(config)
    screen = console()
    for one in tracing.origins[:_FEATURES]:
        screen.print(origins_table(one))
    screen.print(_summary(tracing), markup=False, highlight=False, soft_wrap=True)
    if tracing.failures:
        print(f"batches of spans that failed and are missing: {len(tracing.failures)}", file=sys.stderr)
        return command.PARTLY
    return command.DONE


def origins_table(one: Origins) -> Table:
    """The largest parts, source tokens and pairs of one feature, side by side."""
    spans = f"mean of {one.num_spans} spans" if one.num_spans > 1 else "1 span"
    title = f"{one.hook_point}  {one.sae}  feature {one.feature_id}: {one.pre_activation:.4g}, {spans}"
    table = Table(title=title, title_justify="left", expand=False)
    columns = {"part": one.parts, "token, all heads": one.sources, "head and token": one.pairs}
    for name in columns:
        table.add_column(name, no_wrap=True)
        table.add_column("mean", justify="right", no_wrap=True)
    for place in range(max(min(_SHOWN, len(found)) for found in columns.values())):
        table.add_row(*(cell for found in columns.values() for cell in _cells(found, place)))
    return table


def _cells(found: Sequence[Origin], place: int) -> tuple[Text, Text]:
    if place >= len(found):
        return Text(), Text()
    return Text(found[place].label), Text(f"{found[place].mean:+.2f}")


def _summary(tracing: Tracing) -> str:
    silent = f" (features without one: {tracing.without_spans})" if tracing.without_spans else ""
    more = f" ({_FEATURES} are shown here)" if tracing.num_features > _FEATURES else ""
    return "\n".join(
        [
            f"traced    features: {tracing.num_features}{more}, spans: {tracing.num_spans}{silent}",
            f"computed  in {tracing.dtype}; the catalog's codes in {tracing.catalog_dtype}",
            f"results   {tracing.folder}/sources.{{parquet,csv,html}}",
            f"time      {tracing.seconds:.1f} s",
        ]
    )


def main() -> None:
    """`sae-census trace`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("trace", TraceConfig, job)
