"""`sae-census sweep`: one tick of scheduled runs; cron, a Kubernetes CronJob or a Ray job calls it.

Exit codes: 0 done or nothing due; 2 the config is wrong; 3 an entry failed; 4 an entry drifted out of bounds.
"""

import json
import sys

from sae_census.cli import command
from sae_census.config import SweepConfig
from sae_census.flows.census.sweep import sweep

ALERT = 4


def job(config: SweepConfig) -> int:
    """Run the tick; alarms go to stdout as one line of JSON that a webhook takes."""
    runs = sweep(config, say=lambda line: print(line, file=sys.stderr))
    alarmed = [run for run in runs if run.alerts]
    for run in alarmed:
        text = f"SAE Census: {run.entry} drifted: {'; '.join(run.alerts)}"
        print(json.dumps({"text": text, **run.model_dump(mode="json")}))
    if any(run.status in ("failed", "partly") for run in runs):
        return command.PARTLY
    return ALERT if alarmed else command.DONE


def main() -> None:
    """`sae-census sweep`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("sweep", SweepConfig, job)
