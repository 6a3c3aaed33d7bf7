"""`sae-census analyze`: a model, SAEs and a corpus become a catalog; bare, it runs the embedded demo."""

import sys

from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console, highlighted
from sae_census.config import AnalyzeConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import Analysis, analyze

_BEST = 5


def job(config: AnalyzeConfig) -> int:
    """Run the flow and show what came out."""
    analysis = analyze(config)
    screen = console()
    for row in sorted(analysis.catalog.best(1).to_pylist(), key=lambda row: (row["layer"], row["sae"])):
        screen.print(best_table(analysis.catalog, row["hook_point"], row["sae"], num_features=_BEST))
    screen.print(_summary(analysis), markup=False, highlight=False, soft_wrap=True)
    if analysis.failures:
        print(f"{len(analysis.failures)} shards failed and are missing from the catalog", file=sys.stderr)
        return command.PARTLY
    return command.DONE


def best_table(catalog: Catalog, hook_point: str, sae: str, num_features: int) -> Table:
    """The best ranked features of one SAE with their strongest spans, peak token highlighted."""
    score = catalog.manifest.ranking.score
    table = Table(title=f"{hook_point}  {sae}  by {score}", title_justify="left", expand=False)
    for name in ("rank", "feature", score, "fires on", "max"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(len(name), 5))
    table.add_column("strongest spans", no_wrap=True)
    for row in catalog.best(num_features, hook_point, sae).to_pylist():
        spans = catalog.spans(hook_point, sae, row["feature_id"], ["top"]).slice(0, 2).to_pylist()
        text = Text("\n").join(highlighted(span) for span in spans)
        numbers = (
            row["rank"],
            row["feature_id"],
            f"{row['score']:.4g}",
            f"{row['frequency']:.3%}",
            f"{row['max']:.4g}",
        )
        table.add_row(*map(str, numbers), text)
    return table


def _summary(analysis: Analysis) -> str:
    catalog = analysis.catalog
    coverage = catalog.manifest.coverage
    lines = [f"catalog   {catalog.folder}{'' if analysis.is_new else ' (unchanged)'}", f"digest    {catalog.digest}"]
    for point, books in coverage.tokens.items():
        masked = ", ".join(f"{n} {rule}" for rule, n in books.items() if rule != "counted" and n)
        lines.append(
            f"tokens    {books['counted']:,} counted at {point}" + (f" (not counted: {masked})" if masked else "")
        )
    for site, fvu in catalog.manifest.fraction_of_variance_unexplained.items():
        lines.append(
            f"fit       {site}: fraction of variance unexplained {fvu:.3f}"
            if fvu is not None
            else f"fit       {site}: unknown"
        )
    if analysis.report:
        lines.append(f"report    {analysis.report.index}")
    lines.append("time      " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in analysis.seconds.items()))
    return "\n".join(lines)


def main() -> None:
    """`sae-census analyze`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("analyze", AnalyzeConfig, job)
