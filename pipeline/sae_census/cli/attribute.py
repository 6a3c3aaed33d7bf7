"""`sae-census attribute`: the tokens that every feature promotes and suppresses, into a catalog or a folder."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console
from sae_census.config import AttributeConfig
from sae_census.flows.catalog.attribute import attribute
from sae_census.io.store import tables
from sae_census.steps.census.logits import LOGITS, MOMENTS

_FEATURES, _TOKENS = 5, 6
_TOKENS_WIDTH = 42


def job(config: AttributeConfig) -> int:
    """Run the flow and show the features whose logits are the most peaked."""
    attribution = attribute(config)
    screen = console()
    for table in peaked(attribution.folder):
        screen.print(table)
    print(f"computed  from {attribution.dtype} weights")
    print(f"logits    {attribution.folder}{'' if attribution.is_new else ' (unchanged)'}")
    print(f"time      {attribution.seconds:.1f} s")
    return command.DONE


def peaked(folder: Path) -> Iterator[Table]:
    """For every SAE, the features of greatest kurtosis with the tokens that they move most."""
    moments = tables.read(folder / MOMENTS).sort_by([("kurtosis", "descending"), ("feature_id", "ascending")])
    rows = moments.to_pylist()
    for hook_point, sae in sorted({(row["hook_point"], row["sae"]) for row in rows}):
        title = f"{hook_point}  {sae}  by kurtosis of its logits"
        table = Table(title=title, title_justify="left", expand=False, min_width=len(title))
        for name in ("feature", "kurtosis"):
            table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
        for name in ("promotes", "suppresses"):
            table.add_column(name, no_wrap=True, max_width=_TOKENS_WIDTH)
        for row in [r for r in rows if (r["hook_point"], r["sae"]) == (hook_point, sae)][:_FEATURES]:
            key = [("hook_point", "=", hook_point), ("sae", "=", sae), ("feature_id", "=", row["feature_id"])]
            found = tables.read(folder / LOGITS, filters=[*key, ("rank", "<=", _TOKENS)]).to_pylist()
            texts = [
                Text(" ".join(_shown(r["token"]) for r in found if r["sign"] == s)) for s in ("positive", "negative")
            ]
            table.add_row(str(row["feature_id"]), f"{row['kurtosis']:.3g}", *texts)
        yield table


def _shown(token: str) -> str:
    plain = token.replace(" ", "·").replace("\n", "↩").replace("\t", "→")
    return "".join(c if c.isprintable() else "�" for c in plain) or "∅"


def main() -> None:
    """`sae-census attribute`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("attribute", AttributeConfig, job)
