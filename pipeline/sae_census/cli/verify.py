"""`sae-census verify store.root=…`: every shard, receipt and snapshot of a store against its bytes."""

import sys

from sae_census.cli import command
from sae_census.config import VerifyConfig
from sae_census.flows.census.verify import verify


def job(config: VerifyConfig) -> int:
    """Print what is wrong, if anything."""
    verdict = verify(config)
    for sentence in verdict.wrong:
        print(sentence, file=sys.stderr)
    for sentence in verdict.mixed:
        print(sentence)
    if verdict.unproven:
        told = ", ".join(f"{number} {kind}" for kind, number in sorted(verdict.unproven.items()))
        print(
            f"{told} were written before records carried a digest of their own: what they say is not proven; "
            "sae-census analyze, run as for their catalogs again, gives them one"
        )
    print(
        f"{verdict.num_checked} files checked, {verdict.num_recomputed} shards recomputed, {len(verdict.wrong)} wrong"
    )
    return command.PARTLY if verdict.wrong else command.DONE


def main() -> None:
    """`sae-census verify`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("verify", VerifyConfig, job)
