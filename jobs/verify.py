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
    print(
        f"{verdict.num_checked} files checked, {verdict.num_recomputed} shards recomputed, {len(verdict.wrong)} wrong"
    )
    return _main.PARTLY if verdict.wrong else _main.DONE


if __name__ == "__main__":
    _main.main("verify", VerifyConfig, job)
