"""`sae-census steer`: a prompt and edits; prints steered and unsteered text side by side."""

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from sae_census.cli import command
from sae_census.config import SteerConfig
from sae_census.flows.effects.steer import EditedFeature, Steering, Text, steer

_PLAIN_WIDTH = 116
_SHOWN = 8


def job(config: SteerConfig) -> int:
    """Run the flow and show what came out."""
    steering = steer(config)
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    table = Table(show_lines=True)
    for title in ("unsteered", "steered"):
        table.add_column(title, ratio=1)
    table.add_row(*(_marked(steering.prompt, text) for text in (steering.unsteered, steering.steered)))
    console.print(table)
    console.print("\n".join(_lines(steering)), markup=False, highlight=False, soft_wrap=True)
    return command.DONE


def _marked(prompt: str, text: Text) -> Styled:
    return Styled.assemble((prompt, "dim"), text.continuation)


def _lines(steering: Steering) -> Iterator[str]:
    yield f"computed  in {steering.dtype} on {steering.device}"
    for name, count in steering.positions.items():
        left_out = steering.left_out[name]
        said = ", ".join(f"{n} {rule}" for rule, n in left_out.items())
        idle = "" if count.touched else ": the edits left every code as it was, and both texts come from one model"
        if sum(left_out.values()) == count.seen:
            idle = ": the edits could act nowhere, and both texts come from one model"
        yield (
            f"touched   {count.touched} of {count.seen} positions at {name} (positions={steering.chosen}"
            + (f"; left out: {said})" if said else ")")
            + idle
        )
    yield f"KL        {steering.kl_next:.4g} nats at the first new token, {steering.kl_mean:.4g} mean over the text"
    for kind, text in (("unsteered", steering.unsteered), ("steered", steering.steered)):
        for one in text.edited:
            yield f"codes     {one.site} {one.edit.feature}, {kind}, before the edit: {_firings(text, one)}"
    for change in steering.changed:
        yield (
            f"changed   {change.site} {change.feature_id}: mean code {change.unsteered:.3g} -> {change.steered:.3g} "
            "on the unsteered text"
        )


def _firings(text: Text, one: EditedFeature) -> str:
    """The tokens where the feature fired most, in the order of the text."""
    fired = [place for place, code in enumerate(one.codes) if code > 0]
    best = sorted(sorted(fired, key=lambda place: (-one.codes[place], place))[:_SHOWN])
    shown = ", ".join(f"{text.tokens[place]!r} {one.codes[place]:.1f}" for place in best)
    return f"fires on {len(fired)} of {len(one.codes)} tokens" + (f": {shown}" if shown else "")


def main() -> None:
    """`sae-census steer`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("steer", SteerConfig, job)
