"""`sae-census catalog`: list snapshots, build new ones of chosen slices, show what changed, compact partials."""

from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console, correlation, highlighted, printable
from sae_census.config import SnapshotsConfig
from sae_census.errors import ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.compact import compact
from sae_census.flows.census.snapshots import build, snapshots
from sae_census.flows.comparison.diff import CHANGES, Difference, diff
from sae_census.steps.comparison.contrast import Columns, test_behind
from sae_census.types import SiteKey

_SPAN, _MARKS = 28, 8
"""Columns of a span, and what the marks of its peak and the peak itself take, about."""


def job(config: SnapshotsConfig) -> int:
    """Do what `action` says."""
    match config.action:
        case "list":
            _list(config)
        case "build":
            catalog, is_new = build(config)
            print(f"catalog   {catalog.folder}{'' if is_new else ' (unchanged)'}\ndigest    {catalog.digest}")
            for name, facts in catalog.manifest.coverage.slices.items():
                weight = catalog.manifest.weights.get(name, 1)
                times = f", counted {weight} times" if weight > 1 else ""
                print(f"slice     {printable(name)}: {facts.tokens:,} tokens in {facts.shards} shards{times}")
        case "compact":
            _compact(config)
        case "diff":
            _show(diff(config), config)
    return command.DONE


def _compact(config: SnapshotsConfig) -> None:
    found = compact(config.store.root, config.catalog.name, config.snapshot, prune=config.prune, cluster=config.cluster)
    print(f"nodes     {found.num_made} made, {found.num_kept} there already, {found.num_skipped} not needed")
    if config.prune:
        print(f"pruned    {found.num_pruned} files")
    print(f"bytes     {found.bytes_before:,} before, {found.bytes_after:,} after")


def _list(config: SnapshotsConfig) -> None:
    table = Table()
    for name in ("catalog", "snapshot", "made (UTC)", "shards", "tokens", "SAEs", "slices", "digest"):
        table.add_column(name, justify="right" if name in ("snapshot", "shards", "tokens", "SAEs") else "left")
    for one in snapshots(config.store.root):
        slices = ", ".join(printable(name) + (f" ×{one.weights[name]}" if one.weights else "") for name in one.slices)
        table.add_row(
            one.catalog,
            str(one.snapshot),
            f"{datetime.fromtimestamp(one.made_at, UTC):%Y-%m-%d %H:%M}",
            f"{one.shards}{'' if one.complete else ' (some missing)'}",
            f"{sum(one.slices.values()):,}",
            str(one.saes),
            Text(slices),
            one.digest[:12],
        )
    if not table.rows:
        raise ConfigError(f"store.root {config.store.root} holds no catalogs; give the root of an analysis")
    console().print(table)


def _show(found: Difference, config: SnapshotsConfig) -> None:
    screen, texts = console(), found.summary["texts"]
    for site in sorted(found.sites, key=lambda site: (site.hook_point, site.sae)):
        for word in ("more", "less"):
            if found.summary["sites"][str(site)][word]:
                screen.print(_moved(found, config, site, word), highlight=False)
    lines = [f"diff      {found.folder}"]
    for when in ("old", "new"):
        about = found.summary[when]
        tokens = ", ".join(f"{printable(name)} {n:,}" for name, n in about["tokens"].items())
        lines.append(f"{when}       snapshot {about['snapshot']:06d}: {about['shards']} shards; tokens: {tokens}")
    said = {
        "grown": "new text ({after} shards) against the text that was there ({before})",
        "shrunk": "text that went ({before} shards) against the text that stayed ({after})",
        "exchanged": "text that went ({before} shards) against text that came ({after})",
        "same": "nothing: both snapshots hold the same text",
    }
    lines.append(f"tested    {said[texts['kind']].format(**texts)}")
    for name, verdict in found.summary["sites"].items():
        changes = ", ".join(f"{verdict['changes'][word]:,} {word}" for word in CHANGES)
        lines.append(f"features  {name}: {changes} ({verdict['tested']:,} tested)")
        overlap = ", ".join(f"@{n} {share:.0%}" for n, share in verdict["overlap"].items())
        fits = verdict["fraction_of_variance_unexplained"]
        known = None not in fits.values()
        fit = f"; fraction of variance unexplained {fits['old']:.3f} -> {fits['new']:.3f}" if known else ""
        lines.append(
            f"ranking   {name}: by {verdict['ranking']}: rank correlation {correlation(verdict['rank_correlation'])}, "
            f"overlap {overlap}{fit}"
        )
    screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _moved(found: Difference, config: SnapshotsConfig, site: SiteKey, word: str) -> Table:
    """The features that moved most surely in one direction."""
    columns: Columns = found.sites[site]
    table = Table(title=f"{site.hook_point}  {site.sae}  {word} in the text after", title_justify="left")
    widths = {"feature": 7, "rank": 11, config.rank_by.replace("_", " "): 20, "before": 7, "after": 7, "q": 5}
    for name, width in widths.items():
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    table.add_column("strongest span", no_wrap=True, max_width=_SPAN + _MARKS)
    by = config.rank_by
    estimate = columns[by if by in columns else f"{by}_difference"]
    for feature in found.summary["sites"][str(site)][word]:
        ends = f"[{columns[f'{by}_low'][feature]:.3g}, {columns[f'{by}_high'][feature]:.3g}]"
        table.add_row(
            str(feature),
            f"{columns['rank_old'][feature]} → {columns['rank_new'][feature]}",
            f"{estimate[feature]:.3g} {ends}".replace("inf", "∞"),
            *(f"{100 * columns[f'frequency_{side}'][feature]:.3g}%" for side in "ba"),
            f"{columns[f'{test_behind(by)}_q'][feature]:.0e}",
            _strongest(found.new if word == "more" else found.old, site, feature),
        )
    return table


def _strongest(catalog: Catalog, site: SiteKey, feature: int) -> Text:
    spans = catalog.spans(str(site.hook_point), site.sae, feature, ["top"]).to_pylist()
    return highlighted(spans[0], _SPAN) if spans else Text("(no span was kept)")


def main() -> None:
    """`sae-census catalog`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("catalog", SnapshotsConfig, job)
