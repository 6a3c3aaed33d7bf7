"""`sae-census query catalog.name=demo ask=firing_on text=except`: one question to a catalog."""

import sys
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console, printable
from sae_census.config.query import QueryConfig
from sae_census.flows.catalog.query import query
from sae_census.io import answers

_HIDDEN = {"tokens", "token_ids", "values", "shard_id", "document_id"}


def job(config: QueryConfig) -> int:
    """Answer on the terminal, or in a file."""
    rows = query(config)
    if config.out is not None:
        answers.write_rows(Path(config.out), rows)
        print(f"{len(rows)} rows written to {config.out}", file=sys.stderr)
        return command.DONE
    screen = console()
    screen.print(table(rows, screen.width) if rows else "nothing found")
    return command.DONE


def table(rows: list[dict[str, Any]], width: int) -> Table:
    """Rows for people: one row stands upright; columns that are the same in all rows are the caption."""
    if len(rows) == 1:
        upright = Table("column", "value")
        for name, value in rows[0].items():
            upright.add_row(name, Text(_cell(value)))
        return upright
    names = [name for name in rows[0] if name not in _HIDDEN]
    same = [name for name in names if all(row[name] == rows[0][name] for row in rows)]
    flat = Table(caption="  ".join(f"{name}: {_cell(rows[0][name])}" for name in same) or None, caption_justify="left")
    shown = [name for name in names if name not in same]
    widths = {name: max(len(name), *(len(_cell(row[name])) for row in rows)) for name in shown}
    if "text" in widths:  # it takes what the others leave
        widths["text"] = max(20, width - sum(n for name, n in widths.items() if name != "text") - 3 * len(shown) - 1)
    for name in shown:
        justify: Any = "right" if isinstance(rows[0][name], int | float) else "left"
        flat.add_column(name, justify=justify, no_wrap=True, width=widths[name])
    for row in rows:
        flat.add_row(*(Text(_cell(row[name])) for name in shown))
    return flat


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def main() -> None:
    """`sae-census query`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("query", QueryConfig, job)
