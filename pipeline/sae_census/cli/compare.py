"""`sae-census compare`: which features tell two slices, two catalogs, two models or two sets of prompts apart."""

from typing import Any

from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console, correlation, highlighted
from sae_census.config import CompareConfig
from sae_census.flows.comparison.compare import Comparison, compare
from sae_census.flows.comparison.sides import Side
from sae_census.steps.comparison.contrast import Columns, test_behind
from sae_census.types import SiteKey

_MARKS = 8
"""Columns that the marks of a span's peak and the peak itself take, about."""


def job(config: CompareConfig) -> int:
    """Run the flow and show what came out."""
    comparison = compare(config)
    screen = console()
    for site in sorted(comparison.sites, key=lambda site: (site.hook_point, site.sae)):
        for side in ("a", "b"):
            table = best_table(comparison, config, site, side, screen.width)
            screen.print(table if table.rows else f"{table.title}: none for sure", highlight=False)
    screen.print(_summary(comparison, config), markup=False, highlight=False, soft_wrap=True)
    return command.DONE


def best_table(comparison: Comparison, config: CompareConfig, site: SiteKey, side: str, width: int) -> Table:
    """The best ranked features of one direction with their strongest span on that side, `width` columns wide."""
    columns, labels = comparison.sites[site], comparison.labels
    here, there = labels if side == "a" else labels[::-1]
    effect = config.rank_by.replace("_", " ")
    table = Table(title=f"{site.hook_point}  {site.sae}  more in {here} than in {there}", title_justify="left")
    for name, least in (("rank", 4), ("feature", 7), (effect, 20), *((f"in {label}", 7) for label in labels), ("q", 5)):
        needed = max(len(name), least)
        table.add_column(name, justify="right", no_wrap=True, min_width=needed)
        width -= needed + 3
    room = max(width - 4, 2 * _MARKS)
    table.add_column("strongest span", no_wrap=True, max_width=room)
    for feature in comparison.summary["sites"][str(site)][f"best_{side}"]:
        table.add_row(
            f"{columns[f'rank_{side}'][feature]:.0f}",
            str(feature),
            _effect(columns, config.rank_by, feature, 1 if side == "a" else -1),
            *(f"{100 * columns[f'frequency_{name}'][feature]:.3g}%" for name in "ab"),
            f"{columns[f'{test_behind(config.rank_by)}_q'][feature]:.0e}",
            _strongest(comparison.a if side == "a" else comparison.b, site, feature, room - _MARKS),
        )
    return table


def _effect(columns: Columns, by: str, feature: int, sign: int) -> str:
    """How much more there is in the table's direction, with its interval."""
    estimate = columns[by if by in columns else f"{by}_difference"][feature]
    ends = sorted(sign * columns[f"{by}_{end}"][feature] for end in ("low", "high"))
    return f"{sign * estimate:.3g} [{ends[0]:.3g}, {ends[1]:.3g}]".replace("inf", "∞")


def _strongest(side: Side, site: SiteKey, feature: int, width: int) -> Text:
    spans = side.catalog.spans(str(site.hook_point), site.sae, feature).to_pylist()
    mine = [span for span in spans if span["slice"] in side.slices and span["value"] > 0]
    return highlighted(max(mine, key=lambda span: span["value"]), width) if mine else Text("(no span was kept)")


def _summary(comparison: Comparison, config: CompareConfig) -> str:
    summary, labels = comparison.summary, comparison.labels
    lines = [f"compared  {comparison.folder}"]
    for side, label in zip("ab", labels, strict=True):
        about = summary[side]
        lines.append(
            f"{side}         {label}, catalog {about['catalog']} {about['snapshot']:06d}, computed in {about['dtype']}"
        )
        for point, documents in about["documents"].items():
            even, tokens = about["documents_of_one_size"][point], about["tokens_counted"][point]
            lines.append(
                f"          {tokens:,} tokens counted at {point}, in {documents:,} documents that weigh as {even:.0f} "
                "of one size"
            )
    for site, verdict in summary["sites"].items():
        of, left = verdict[test_behind(config.rank_by)], verdict["not_tested"]
        lines.append(
            f"found     {site}: more in {labels[0]} {of['more_in_a']:,}, more in {labels[1]} {of['more_in_b']:,} of "
            f"{verdict['tested']:,} features tested, at a false discovery rate of {config.false_discovery_rate:g} "
            f"(not tested: {left['silent']} silent, {left['few_documents']} in too few documents)"
        )
    lines += [f"left out  {site}: only one side has it" for site in summary["sites_left_out"]]
    return "\n".join([*lines, *_drift(summary)])


def _drift(summary: dict[str, Any]) -> list[str]:
    if summary["drift"] is None:
        return []
    unpaired = "are those of unpaired sides, wider than need be; codes=keep in both catalogs would pair documents"
    lines = [f"intervals {'are paired by document' if summary['paired'] else unpaired}"]
    for site, report in summary["drift"].items():
        fvu, l0 = report["fraction_of_variance_unexplained"], report["codes_a_token"]
        known = None not in fvu.values()
        fit = f"fraction of variance unexplained {fvu['a']:.3f} -> {fvu['b']:.3f}, " if known else ""
        lines.append(f"fit       {site}: {fit}codes a token {l0['a']:.1f} -> {l0['b']:.1f}")
        bins = report["histogram_distance"]
        if bins["median"] is not None:
            lines.append(
                f"codes     {site}: the share of firing codes in other bins is {bins['median']:.1%} for half of the "
                f"features, {bins['p95']:.1%} for 95 % of them"
            )
        for name, ranking in report["rankings"].items():
            overlap = ", ".join(f"@{n} {share:.0%}" for n, share in ranking["overlap"].items())
            moved = correlation(ranking["rank_correlation"])
            lines.append(f"ranking   {site}: by {name}: rank correlation {moved}, overlap {overlap}")
    return lines


def main() -> None:
    """`sae-census compare`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("compare", CompareConfig, job)
