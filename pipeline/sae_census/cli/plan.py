"""`sae-census plan`: the same overrides as `sae-census analyze`; prints what it would cost, runs nothing."""

from sae_census.cli import command
from sae_census.config import AnalyzeConfig, ClusterConfig
from sae_census.flows.census.plan import Plan, make_plan


def job(config: AnalyzeConfig) -> int:
    """Print the plan."""
    print(describe(make_plan(config), config.cluster))
    return command.DONE


def describe(plan: Plan, cluster: ClusterConfig) -> str:
    """The plan as lines for people."""
    cost = plan.cost
    lines = [
        *(f"warning   {one}" for one in plan.passed_over),
        f"sources   {plan.num_sources}, of which {plan.num_prepared} are prepared",
        f"shards    {cost.num_shards} prepared, {cost.num_done} done, {cost.num_tokens_left:,} tokens left in others",
    ]
    if plan.unprepared_tokens:
        lines.append(f"text      about {plan.unprepared_tokens:,} tokens are not prepared yet and not in these figures")
    lines.append(f"disk      up to {_mib(cost.partial_bytes)} of partials; {_mib(plan.free_bytes)} free")
    if cost.num_tokens_left and cost.bytes_per_token > _CODE_BYTES * cost.num_saes:
        lines.append(
            f"warning   {cost.bytes_per_token:.0f} bytes of partial a token: larger corpus.shard_tokens would cost less"
        )
    lines.append(f"memory    {_mib(cost.worker_bytes)} a worker, beside model and SAEs")
    lines += [f"workers   {kind.workers} x {kind.needs(cluster.threads_per_worker)}" for kind in cluster.classes]
    if plan.tokens_per_second is None:
        lines.append("time      not known before the first shard is done")
    else:
        rate, num_workers = plan.tokens_per_second, cluster.num_workers
        left = (cost.num_tokens_left + plan.unprepared_tokens) / rate / num_workers
        lines.append(f"time      about {left:,.0f} s with {num_workers} workers at {rate:,.0f} tokens/s each")
    return "\n".join(lines)


_CODE_BYTES = 142
"""What all codes of a token take when they are kept, for one SAE with 32 codes a token (measured)."""


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"


def main() -> None:
    """`sae-census plan`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("analyze", AnalyzeConfig, job)
