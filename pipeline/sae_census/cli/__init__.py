"""Doors for people: `sae-census JOB …`, a module for each job, and the HTTP application."""

import difflib
import sys
from importlib import import_module

JOBS = {
    "analyze": "count, measure and sample every feature over a corpus; makes or grows a catalog",
    "plan": "what the same overrides of analyze would cost; runs nothing",
    "status": "what runs, what ran, what failed, from the store alone",
    "verify": "every record and file of a store against its digests",
    "query": "features of a catalog as a table, Parquet, CSV or JSON lines",
    "report": "a catalog as pages that a browser opens from disk",
    "catalog": "list, build, diff and compact snapshots",
    "sweep": "one tick of scheduled runs, with alarms",
    "discover": "which features a prompt uses; the command sae-discover",
    "serve": "discovery and catalogs over HTTP",
    "compare": "what tells two corpora, catalogs or sets of prompts apart",
    "attribute": "the tokens that each feature writes to the logits",
    "trace": "what a feature is made of: embeddings, heads, source tokens, MLPs",
    "steer": "generate with features edited, beside the same without",
    "ablate": "what the model predicts worse without a feature, beside a control",
}
"""Every job, in the order of `sae-census --help`, with what it is for."""


def main() -> None:
    """Run the job that the first argument names; without one, list the jobs."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name in JOBS:
        sys.argv[:2] = [f"sae-census {name}"]
        import_module(f"sae_census.cli.{name}").main()
    else:
        near = difflib.get_close_matches(name, JOBS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(JOBS)}"
        print(f"error: {name!r} is no job; {advice}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """How to call a job, and a line for each."""
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {line}" for name, line in JOBS.items()]
    head = "usage: sae-census JOB [key=value] …   (sae-census JOB --help shows every key and its default)"
    return "\n".join([head, "", *lines])
