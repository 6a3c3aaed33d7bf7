"""`sae-census ablate`: features of a catalog zeroed over their spans; prints what predictions lose."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from sae_census.cli import command
from sae_census.config import AblateConfig
from sae_census.flows.effects.ablate import ablate

_PLAIN_WIDTH = 116


def job(config: AblateConfig) -> int:
    """Run the flow and show what came out."""
    done = ablate(config, lambda text: print(text, file=sys.stderr))
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    rows = done.table.to_pylist()
    for site in dict.fromkeys((row["hook_point"], row["sae"]) for row in rows):
        console.print(_table([row for row in rows if (row["hook_point"], row["sae"]) == site]))
    print(f"computed  in {rows[0]['dtype']}")
    for row in rows:
        tokens = " ".join(repr(token) for token in row["tokens"])
        print(f"logits    {row['sae']} {row['feature_id']}: of {tokens} ({row['top_tokens']})")
    print(f"table     {done.path}")
    for sentence in done.skipped:
        print(f"skipped   {sentence}", file=sys.stderr)
    for sentence in done.failures:
        print(f"failed    {sentence}", file=sys.stderr)
    return command.PARTLY if done.failures else command.DONE


def _table(rows: list[dict[str, Any]]) -> Table:
    """Changes with their intervals, and how far they exceed those of the control, span by span."""
    first = rows[0]
    table = Table(
        title=f"{first['hook_point']}  {first['sae']}  zeroed on {first['group']} spans",
        caption=f"means with {first['confidence']:.0%} intervals; control: an equal step along another feature",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("feature", "spans", "loss, nats a token", "beyond control", "logits", "beyond control"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        changes = (_interval(row, name) for name in ("loss", "excess_loss", "logit", "excess_logit"))
        table.add_row(str(row["feature_id"]), str(row["spans"]), *changes)
    return table


def _interval(row: dict[str, Any], name: str) -> str:
    mean, high = row[f"{name}_change"], row[f"{name}_change_high"]
    return f"{mean:+.2f} ± {high - mean:.2f}"


def main() -> None:
    """`sae-census ablate`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("ablate", AblateConfig, job)
