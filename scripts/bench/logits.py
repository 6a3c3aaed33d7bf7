"""Time and memory of direct logits on synthetic weights.

    python scripts/bench/logits.py [--features 65536] [--tokens 49152] [--width 576] [--threads 2]

Prints the largest tensor that any operation gave, and how far the process grew beyond its inputs.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_census.compute.numbers.logits import FinalNorm, Unembedding, logit_effects
from sae_census.io.model import device


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                size = tensor.untyped_storage().nbytes()
                if size > self.num_bytes:
                    self.num_bytes, self.shape = size, tuple(tensor.shape)
        return out


def resident(field: str) -> int:
    """MiB of `VmRSS` (now) or `VmHWM` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) >> 10


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("features", 65536), ("tokens", 49152), ("width", 576), ("top_k", 10), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device.configure(asked.threads, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(asked.features, asked.width, generator=generator)
    weight = torch.randn(asked.tokens, asked.width, generator=generator, dtype=torch.bfloat16)
    norm = FinalNorm(kind="rms_norm", gain=torch.rand(asked.width, generator=generator), eps=1e-5)
    unembedding = Unembedding(norm=norm, weight=weight)
    logit_effects(rows[:64], unembedding, top_k=asked.top_k)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began = resident("VmRSS"), time.perf_counter()
    with Largest() as seen:
        logit_effects(rows, unembedding, top_k=asked.top_k)
    seconds = time.perf_counter() - began
    dense = asked.features * asked.tokens * 4 / (1 << 20)
    print(f"F {asked.features:,}  V {asked.tokens:,}  D {asked.width}: {seconds:.1f} s on {asked.threads} threads")
    print(f"largest tensor  {seen.num_bytes / (1 << 20):,.1f} MiB {seen.shape}; dense [F, V] is {dense:,.0f} MiB")
    print(f"peak memory     {resident('VmHWM') - before:,} MiB above the inputs' {before:,} MiB")


if __name__ == "__main__":
    main()
