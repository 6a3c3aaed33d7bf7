"""What discovery costs beside the model: one warm request against bare forward + encode, batches against the census.

Latency: a server on loopback answers prompts that it has never seen (text as given, every token kept, no
generation), and in a process of its own plain PyTorch runs the same tokens to the deepest hook and encodes them
with the same settings. Throughput: a batch of prompts against the main job's worker on a shard. Rounds alternate.

Usage: python scripts/bench/discover.py [--rounds 3] [--requests 60] [--tokens 128] [--prompts 1024]
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from floor import census, config_of
from rich.console import Console
from rich.table import Table

from sae_census.config import DiscoverRequest, DiscoveryConfig
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.io import embedded
from sae_census.io.model import device
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.model.reader import Reader

ASK = {"generate": False, "token_filter": "none", "min_coverage_pct": 0.05}


def texts(number: int, tokens: int, seed: int) -> list[str]:
    """Runs of Python's documentation, each of exactly so many tokens."""
    tokenizer = Tokenizer("embedded:model")
    ids = tokenizer.encode(["\n".join(topics[key] for key in sorted(topics))])[0]
    rng = random.Random(seed)
    found: list[str] = []
    while len(found) < number:
        start = rng.randrange(len(ids) - tokens)
        text = tokenizer.decode(ids[start : start + tokens])
        if len(tokenizer.encode([text])[0]) == tokens:
            found.append(text)
    return found


def bare(prompts: list[str]) -> list[float]:
    """Seconds of each prompt in plain PyTorch."""
    device.configure(2, torch.device("cpu"))
    config = DiscoveryConfig()
    reader = Reader(config.model, config.saes)
    seconds = []
    for ids in reader.tokenizer.encode(prompts):
        began = time.perf_counter()
        got = reader.activations(torch.tensor([ids]))
        with torch.inference_mode():
            for site, sae in reader.saes.items():
                sae.encode(got[site.hook_point])
        seconds.append(time.perf_counter() - began)
    return seconds[5:]


def served(prompts: list[str]) -> list[float]:
    """Seconds of each prompt as a request to a server."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "jobs.serve", "port=8765", f"store.root={root}"]
        server = subprocess.Popen(command, env=_environment(root))
        try:
            connection = _connected()
            seconds = []
            for prompt in prompts:
                body = json.dumps({"text": prompt, **ASK})
                began = time.perf_counter()
                connection.request("POST", "/v1/sae/features/discover", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                seconds.append(time.perf_counter() - began)
                assert answer.status == 200, content
        finally:
            server.terminate()
            server.wait()
    return seconds[5:]


def _environment(root: str) -> dict[str, str]:
    """An empty cache of our own that knows the converted model."""
    (Path(root) / "models").symlink_to(embedded.cache_dir() / "models")
    return os.environ | {"SAE_CENSUS_CACHE": root}


def _connected() -> http.client.HTTPConnection:
    for _ in range(600):
        connection = http.client.HTTPConnection("127.0.0.1", 8765)
        try:
            connection.request("GET", "/v1/health")
            connection.getresponse().read()
            return connection
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server does not answer")


def batch(prompts: list[str], tokens: int) -> float:
    """Tokens a second of a batch."""
    discoverer = open_discoverer(DiscoveryConfig(cache_mb=0))
    requests = [DiscoverRequest.model_validate({"text": text, **ASK}) for text in prompts]
    discoverer.discover_many(requests[:32])
    began = time.perf_counter()
    for first in range(0, len(requests), 128):
        for answer in discoverer.discover_many(requests[first : first + 128]):
            json.dumps(answer.model_dump())  # type: ignore[union-attr]
    return len(prompts) * tokens / (time.perf_counter() - began)


def once(program: str, chosen: argparse.Namespace, seed: int) -> float:
    """A program in a process of its own."""
    command = [sys.executable, __file__, "--program", program, "--seed", str(seed)]
    for name in ("requests", "tokens", "prompts"):
        command += [f"--{name}", str(getattr(chosen, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def run(chosen: argparse.Namespace) -> float:
    """Median milliseconds of a request, or tokens a second."""
    if chosen.program in ("bare", "served"):
        prompts = texts(chosen.requests + 5, chosen.tokens, chosen.seed)
        return 1000 * statistics.median((bare if chosen.program == "bare" else served)(prompts))
    if chosen.program == "batch":
        return batch(texts(chosen.prompts, chosen.tokens, chosen.seed), chosen.tokens)
    with tempfile.TemporaryDirectory() as root:
        tokens, seconds = census(config_of(root, "bfloat16", chosen.prompts * chosen.tokens))
        return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.program:
        print(run(chosen))
        return
    table = Table(title="medians of rounds (lowest to highest); ratios are medians of paired rounds")
    for name in ("what", "unit", "floor", "discovery", "discovery / floor"):
        table.add_column(name, justify="right")
    for what, unit, floor, ours in (("warm request", "ms", "bare", "served"), ("batch", "tokens/s", "census", "batch")):
        rounds = [(once(floor, chosen, seed), once(ours, chosen, seed)) for seed in range(chosen.rounds)]
        cells = []
        for place in (0, 1):
            values = sorted(pair[place] for pair in rounds)
            cells.append(f"{statistics.median(values):,.1f} ({values[0]:,.1f} to {values[-1]:,.1f})")
        table.add_row(what, unit, *cells, f"{statistics.median(b / a for a, b in rounds):.3f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
