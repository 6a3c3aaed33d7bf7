"""What everything beside forward and encode costs: the bare loop against one worker's whole work, interleaved.

Three programs take turns on the same shard of the embedded texts, each in a fresh process that loads first
and is timed only while it works:

- bare: plain PyTorch with torch's defaults: forward to the deepest hook, encode, top-k, in the model's dtype.
- tuned: the same with the settings of our workers (float32 matmul precision, malloc).
- census: read the shard, analyse it, write partial and receipt.

Usage: python scripts/bench/floor.py [--rounds 3] [--tokens 65536] [--dtypes bfloat16 float32]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from sae_census.config import AnalyzeConfig
from sae_census.flows.census.identity import find_config_sources, identify, settled
from sae_census.io.model import device
from sae_census.io.model.language_model import LanguageModel
from sae_census.steps.census.prepare import Preparer, PrepareSettings
from sae_census.steps.census.shard import Analyzer, ShardTask
from sae_census.steps.model.reader import load_saes

PROGRAMS = ("bare", "tuned", "census")
K = 32


def config_of(root: str, dtype: str, tokens: int) -> AnalyzeConfig:
    corpus = {"source": "embedded:code", "embedded_tokens": 2 * tokens, "shard_tokens": tokens, "max_tokens": tokens}
    return AnalyzeConfig.model_validate({"model": {"dtype": dtype}, "corpus": corpus, "store": {"root": root}})


def census(config: AnalyzeConfig) -> tuple[int, float]:
    """Tokens and seconds of a whole shard."""
    config = settled(config)
    identity = identify(config)
    settings = PrepareSettings(
        root=config.store.root,
        model=config.model,
        corpus=config.corpus,
        fields=identity.preparation,
        num_embeddings=identity.facts.num_embeddings,
        planned=identity.provenance,
    )
    shard = Preparer(settings).run(find_config_sources(config)[0]).shards[0]
    analyzer = Analyzer(config, identity.preparation_id, identity.measure_ids, identity.numerics, identity.provenance)
    analyzer.activations(next(analyzer.batches(analyzer.contexts(shard.shard_id))))
    began = time.perf_counter()
    analyzer.run(ShardTask(shard=shard, sites=tuple(identity.saes)))
    return shard.num_tokens, time.perf_counter() - began


def bare(config: AnalyzeConfig, tokens: int, *, tuned: bool) -> tuple[int, float]:
    """Tokens and seconds of the loop on random tokens: what they say does not matter to its speed."""
    cpu = torch.device("cpu")
    if tuned:
        device.configure(config.cluster.threads_per_worker, cpu)
    torch.set_num_threads(config.cluster.threads_per_worker)
    dtype = getattr(torch, config.model.dtype)
    saes = {key.hook_point: loaded.sae for key, loaded in load_saes(config.saes).items()}
    weights = {p: s.w_enc.T.contiguous().to(dtype) for p, s in saes.items()}
    biases = {p: (s.b_enc - s.b_dec @ s.w_enc).to(dtype) for p, s in saes.items()}
    model = LanguageModel(config.model.id, dtype=dtype, device=cpu)
    model.drop_above(max(point.layer for point in saes))
    shape = (config.batch.contexts, config.corpus.context_length)
    rows = torch.randint(17, 49152, shape, generator=torch.Generator().manual_seed(0))
    num_batches = tokens // rows.numel()

    def step() -> None:
        with model.captures(saes) as captures:
            got = model.run(captures, rows)
        with torch.inference_mode():
            for point, weight in weights.items():
                torch.nn.functional.linear(got[point].flatten(0, 1), weight, biases[point]).topk(K, dim=-1)

    step()
    began = time.perf_counter()
    for _ in range(num_batches):
        step()
    return num_batches * rows.numel(), time.perf_counter() - began


def run(program: str, dtype: str, tokens: int) -> float:
    """Tokens a second of one program in a process of its own."""
    command = [sys.executable, __file__, "--program", program, "--dtypes", dtype, "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.program:
        with tempfile.TemporaryDirectory() as root:
            config = config_of(root, chosen.dtypes[0], chosen.tokens)
            if chosen.program == "census":
                tokens, seconds = census(config)
            else:
                tokens, seconds = bare(config, chosen.tokens, tuned=chosen.program == "tuned")
        print(tokens / seconds)
        return
    table = Table(title="tokens a second, median (lowest to highest); ratios are medians of paired rounds")
    for name in ("dtype", *PROGRAMS, "census / bare", "census / tuned"):
        table.add_column(name, justify="right")
    for dtype in chosen.dtypes:
        rounds = [{name: run(name, dtype, chosen.tokens) for name in PROGRAMS} for _ in range(chosen.rounds)]
        rates = [sorted(one[name] for one in rounds) for name in PROGRAMS]
        ratios = [statistics.median(one["census"] / one[other] for one in rounds) for other in PROGRAMS[:2]]
        cells = [f"{statistics.median(r):,.0f} ({r[0]:,.0f} to {r[-1]:,.0f})" for r in rates]
        table.add_row(dtype, *cells, *(f"{ratio:.3f}" for ratio in ratios))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
