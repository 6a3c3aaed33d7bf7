"""`sae-census status store.root=…`: what runs of `sae-census analyze` are doing or did, from their store alone."""

import json
import time

from sae_census.cli import command
from sae_census.cli.show import printable
from sae_census.config import StatusConfig
from sae_census.flows.census.run_status import Reason, RunStatus, Straggler
from sae_census.flows.census.status import status

_MOST = 10
"""Failures, losses and stragglers shown of a run."""


def job(config: StatusConfig) -> int:
    """Print every run."""
    found = status(config)
    if config.format == "json":
        print(json.dumps([run.to_json() for run in found], indent=1))
    else:
        print("\n\n".join(text(run, time.time()) for run in found))
    return command.DONE


def text(run: RunStatus, now: float) -> str:
    """A run in a few lines."""
    where = f" on {run.host}" if run.host else ""
    lines = [
        f"run {run.run_id}: {run.state}{_ending(run, now)}",
        f"  catalog    {run.catalog}, started {_clock(run.began_at)}{where}",
        f"  stage      {run.stage or 'planning'} {run.stage_done}/{run.stage_total}",
    ]
    if run.shards_planned:
        lines += [
            f"  shards     {run.shards_before + run.shards_done}/{run.shards_planned} done"
            f" ({run.shards_before} by earlier runs), {run.shards_running} running, {run.shards_waiting} waiting, "
            f"{len(run.failures)} failed",
            f"  tokens     {run.tokens_before + run.tokens_done:,}/{run.tokens_planned:,}{_pace(run)}",
        ]
    workers = f"{run.workers} of {run.workers_wanted} workers, " if run.workers else ""
    lines.append(f"  cost       {workers}{run.worker_seconds:,.1f} worker-seconds on shards")
    lines += _shown("slow", [_slow(item) for item in run.stragglers])
    lines += _shown("lost", [_why(item) for item in run.lost])
    lines += _shown("failed", [_why(item) for item in run.failures])
    if run.num_damaged:
        lines.append(f"  damaged    {run.num_damaged} lines of its events, or its plan, cannot be read")
    return "\n".join(lines)


def _ending(run: RunStatus, now: float) -> str:
    match run.state:
        case "running":
            return f", last seen {max(0.0, now - run.seen_at):.0f} s ago"
        case "finished":
            what = "no snapshot was to be made" if run.snapshot is None else f"snapshot {run.snapshot}"
            return f" after {run.seen_at - run.began_at:.0f} s, {what}"
        case "silent":
            return f", no sign of life for {now - run.seen_at:.0f} s; the same command goes on where it stopped"
    return f" after {run.seen_at - run.began_at:.0f} s: {printable(run.reason)}"


def _pace(run: RunStatus) -> str:
    rate = f", {run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else ""
    left = f", about {run.seconds_left:,.0f} s left" if run.seconds_left is not None else ""
    return rate + left


def _slow(item: Straggler) -> str:
    where = f"on worker {item.worker}, node {item.node}" if item.node else f"on worker {item.worker}"
    return f"shard {item.shard_id} {where}: {item.seconds:.0f} s, others took {item.median_seconds:.1f} s"


def _why(item: Reason) -> str:
    what = f"shard {item.shard_id}: " if item.shard_id else ""
    return f"{what}{item.kind}{f': {item.message}' if item.message else ''}"


def _shown(name: str, items: list[str]) -> list[str]:
    more = [f"and {len(items) - _MOST} more"] if len(items) > _MOST else []
    return [f"  {name:<10} {printable(item)}" for item in [*items[:_MOST], *more]]


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def main() -> None:
    """`sae-census status`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("status", StatusConfig, job)
