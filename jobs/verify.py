"""`python -m jobs.verify store.root=…`: every shard, receipt and snapshot of a store against its bytes."""

import sys

from jobs import _main
from pipeline.config import VerifyConfig
from pipeline.flows.verify import verify


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
            "jobs.analyze, run as for their catalogs again, gives them one"
        )
    print(
        f"{verdict.num_checked} files checked, {verdict.num_recomputed} shards recomputed, {len(verdict.wrong)} wrong"
    )
    return _main.PARTLY if verdict.wrong else _main.DONE


if __name__ == "__main__":
    _main.main("verify", VerifyConfig, job)
