"""The slow twin: the whole analysis once more, dense, unblocked and plain, from the documents to the numbers.

It shares the config, the model's weights and the meaning of words with the pipeline, and no code: documents are
read, packed, masked, encoded and counted here by other means. Sums are float64. Activations and SAE matmuls
are float32 in the pipeline's batch shape on purpose: a top-k or a threshold that flipped in the last bit would
change counts, and then counts and maxima could not be compared exactly.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_census.config import AnalyzeConfig, SaeConfig

RULES = ("padding", "special_tokens", "first_positions", "positions", "max_norm_ratio", "attention_sinks")
COUNTED = "counted"
NEAR_BEFORE, NEAR_AFTER = 8, 4
FIT_EVERY = 16


@dataclass(slots=True)
class Context:
    """One context: its tokens, and of each token the document and where that document's run begins."""

    slice: str
    ids: list[int]
    documents: list[str]
    run_starts: list[int]
    shard_id: str = ""
    row: int = -1

    def run_stop(self, position: int) -> int:
        """Where the run of a token ends."""
        start = self.run_starts[position]
        return max(i for i in range(len(self.ids)) if self.run_starts[i] == start) + 1

    def window(self, position: int, before: int, after: int) -> tuple[int, int]:
        """The tokens around one, inside its document's run."""
        return max(position - before, self.run_starts[position]), min(position + after + 1, self.run_stop(position))


@dataclass(slots=True)
class Site:
    """One SAE: dense codes of every context, zero where a token is not counted, and what it was fed."""

    hook_point: str
    sae: str
    codes: np.ndarray  # (contexts, positions, features) float32
    rules: list[list[str]]  # of each context, the rule of each position, or "counted"
    decoder_norm: np.ndarray
    unexplained: float

    def books(self) -> dict[str, int]:
        """Tokens by rule."""
        found = Counter(rule for context in self.rules for rule in context)
        return {name: found[name] for name in (COUNTED, *RULES)}


class Twin:
    """Everything the catalog should say, computed the slow way."""

    def __init__(self, config: AnalyzeConfig):
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.id)
        adds_bos = self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id
        bos = {"always": True, "never": False, "auto": adds_bos}[config.corpus.bos]
        self.bos = [self.tokenizer.bos_token_id] if bos else []
        self.tokens_truncated = 0
        self.dropped: Counter[str] = Counter()
        shards = self._shards()
        self._name(shards)
        # Addresses order ties, so contexts are kept in the order of their addresses.
        shards.sort(key=lambda shard: shard[0].shard_id)
        self.contexts = [context for shard in shards for context in shard]
        self.sites = self._sites(shards)

    # --- text ---

    def _shards(self) -> list[list[Context]]:
        corpus = self.config.corpus
        size = max(1, corpus.shard_tokens // corpus.context_length)
        shards = []
        for slice_name, pattern in corpus.source.items():
            for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
                contexts = self._pack(slice_name, self._documents(slice_name, path))
                shards += [contexts[i : i + size] for i in range(0, len(contexts), size)]
        return shards

    def _documents(self, slice_name: str, path: Path) -> list[tuple[str, list[int]]]:
        documents = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                record = json.loads(line)
            except ValueError:
                self.dropped["not_json"] += 1
                continue
            if "text" not in record:
                self.dropped["missing_column"] += 1
            elif not record["text"].strip():
                self.dropped["empty"] += 1
            else:
                name = hashlib.sha256(f"{slice_name}\0{path.name}\0{number}".encode()).hexdigest()[:24]
                documents.append((name, self.tokenizer(record["text"], add_special_tokens=False)["input_ids"]))
        return documents

    def _pack(self, slice_name: str, documents: list[tuple[str, list[int]]]) -> list[Context]:
        """Token by token: a run begins with a document or a context, and with a BOS if there is one."""
        corpus = self.config.corpus
        contexts = [Context(slice_name, [], [], [])]
        for name, ids in documents:
            inside = False
            num_contexts = 1
            for place, token in enumerate(ids):
                queue = [token] if inside or [token] == self.bos else [*self.bos, token]
                while queue:
                    if len(contexts[-1].ids) == corpus.context_length:
                        contexts.append(Context(slice_name, [], [], []))
                        num_contexts += 1
                        queue, inside = [token] if [token] == self.bos else [*self.bos, token], False
                    now = contexts[-1]
                    start = now.run_starts[-1] if inside else len(now.ids)
                    now.ids.append(queue.pop(0))
                    now.documents.append(name)
                    now.run_starts.append(start)
                    inside = True
                full = len(contexts[-1].ids) == corpus.context_length
                if full and corpus.packing == "document" and corpus.long_documents == "truncate":
                    self.tokens_truncated += len(ids) - place - 1
                    break
            if corpus.packing == "document":
                contexts.append(Context(slice_name, [], [], []))
        return [context for context in contexts if context.ids]

    def _name(self, shards: list[list[Context]]) -> None:
        """Find each shard's id by looking for its very content among the files of the store."""
        stored = {}
        for path in Path(self.config.store.root).glob("corpora/*/shards/*.parquet"):
            rows = pq.read_table(path).to_pylist()
            stored[json.dumps([[r["input_ids"], r["document_id"], r["document_start"], r["slice"]] for r in rows])] = (
                path.stem
            )
        for shard in shards:
            content = []
            for context in shard:
                starts = sorted(set(context.run_starts))
                content.append([context.ids, [context.documents[i] for i in starts], starts, context.slice])
            shard_id = stored.get(json.dumps(content))
            assert shard_id, f"no stored shard has these contexts: {content}"
            for row, context in enumerate(shard):
                context.shard_id, context.row = shard_id, row

    # --- numbers ---

    def _sites(self, shards: list[list[Context]]) -> list[Site]:
        config = self.config
        torch.set_num_threads(config.cluster.threads_per_worker)
        model = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32).eval()
        size, length = config.batch.contexts, config.corpus.context_length
        saes = [_Sae(chosen) for chosen in config.saes]
        batches = [shard[i : i + size] for shard in shards for i in range(0, len(shard), size)]
        parts: dict[str, list[Any]] = {sae.name: [] for sae in saes}
        for batch in batches:
            ids = torch.full((size, length), self.tokenizer.pad_token_id)
            for row, context in enumerate(batch):
                ids[row, : len(context.ids)] = torch.tensor(context.ids)
            with torch.inference_mode():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
                for sae in saes:
                    x = states[sae.layer + 1]
                    z, back = sae.encode(x)
                    parts[sae.name].append((x[: len(batch)], z[: len(batch)], back[: len(batch)]))
        sites = []
        for sae in sorted(saes, key=lambda sae: (sae.layer, sae.name)):
            x, z, back = (np.concatenate([p[i].numpy() for p in parts[sae.name]]) for i in range(3))
            rules = [self._rules(*one) for one in zip(self.contexts, x, _norms(x), strict=True)]
            counted = np.array(rules) == COUNTED
            sample = counted & (np.array([context.row for context in self.contexts]) % FIT_EVERY == 0)[:, None]
            x, error = x[sample].astype(np.float64), (x - back)[sample].astype(np.float64)
            sites.append(
                Site(
                    hook_point=sae.hook_point,
                    sae=sae.name,
                    codes=np.where(counted[:, :, None], z, np.float32(0)),
                    rules=rules,
                    decoder_norm=sae.w_dec.double().norm(dim=1).numpy(),
                    unexplained=float((error**2).sum() / ((x - x.mean(axis=0)) ** 2).sum()),
                )
            )
        return sites

    def _rules(self, context: Context, x: np.ndarray, norms: list[np.float32]) -> list[str]:
        masks = self.config.masks
        real = sorted(norms[: len(context.ids)])
        median = real[(len(real) - 1) // 2]
        rules = []
        for position in range(self.config.corpus.context_length):
            if position >= len(context.ids):
                rules.append("padding")
            elif masks.special_tokens and context.ids[position] in self.tokenizer.all_special_ids:
                rules.append("special_tokens")
            elif position < masks.first_positions:
                rules.append("first_positions")
            elif position in masks.positions:
                rules.append("positions")
            elif masks.max_norm_ratio is not None and norms[position] > masks.max_norm_ratio * median:
                rules.append("max_norm_ratio")
            elif masks.attention_sinks is not False and _is_sink(x[position], median):
                rules.append("attention_sinks")
            else:
                rules.append(COUNTED)
        return rules

    def features(self, site: Site) -> dict[str, np.ndarray]:
        """The columns of `features.parquet`, quantiles exact."""
        counted = np.array(site.rules) == COUNTED
        codes = site.codes[counted].astype(np.float64)  # (counted tokens, features)
        num_tokens, num_contexts = len(codes), int(counted.any(axis=1).sum())
        count = (codes > 0).sum(axis=0)
        in_contexts = (site.codes > 0).any(axis=1).sum(axis=0)
        columns = {
            "count": count,
            "tokens_counted": np.full(len(count), num_tokens),
            "frequency": count / num_tokens,
            "context_count": in_contexts,
            "context_frequency": in_contexts / num_contexts,
            "mean": codes.mean(axis=0),
            "mean_when_firing": np.array([_mean(column[column > 0]) for column in codes.T]),
            "std": codes.std(axis=0),
            "max": codes.max(axis=0),
            "dead": count == 0,
            "decoder_norm": site.decoder_norm,
        }
        for name, percent in (("p50", 50), ("p95", 95), ("p99", 99)):
            columns[name] = np.array([_nearest_rank(sorted(c[c > 0]), percent) for c in codes.T])
        columns["score"] = self._scores(columns)
        order = sorted(range(len(count)), key=lambda f: (-columns["score"][f], f))
        columns["rank"] = np.array([order.index(f) + 1 for f in range(len(count))])
        return columns

    def _scores(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        name = self.config.ranking.score
        if name == "mean_x_coverage":
            return columns["mean"] * columns["frequency"]
        if name == "surprise":
            rows = zip(columns["mean_when_firing"], columns["frequency"], columns["count"], strict=True)
            return np.array([m * -math.log2(f) * n / (n + 100) if n else 0.0 for m, f, n in rows])
        return columns[name].astype(np.float64)

    def slices(self, site: Site) -> dict[tuple[int, str], dict[str, float]]:
        """The rows of `slices.parquet` by feature and slice."""
        rows = {}
        counted = np.array(site.rules) == COUNTED
        for name in {context.slice for context in self.contexts}:
            mine = np.array([context.slice == name for context in self.contexts])
            codes = site.codes[mine][counted[mine]].astype(np.float64)
            for feature, column in enumerate(codes.T):
                fired = column[column > 0]
                rows[feature, name] = {
                    "count": len(fired),
                    "tokens_counted": len(column),
                    "frequency": len(fired) / len(column),
                    "sum": fired.sum(),
                    "mean_when_firing": _mean(fired),
                    "max": max(fired, default=0.0),
                }
        return rows

    def documents(self, site: Site) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By slice: counted tokens (documents), firings and sums of codes (documents, features).

        A document that is cut at the edge of a shard is two.
        """
        found: dict[str, dict[tuple[str, str], list[np.ndarray]]] = {}
        for context, codes, rules in zip(self.contexts, site.codes, site.rules, strict=True):
            documents = found.setdefault(context.slice, {})
            for position, name in enumerate(context.documents):
                if rules[position] == COUNTED:
                    documents.setdefault((context.shard_id, name), []).append(codes[position].astype(np.float64))
        return {
            name: (
                np.array([len(tokens) for tokens in documents.values()]),
                np.array([(np.array(tokens) > 0).sum(axis=0) for tokens in documents.values()]),
                np.array([np.array(tokens).sum(axis=0) for tokens in documents.values()]),
            )
            for name, documents in found.items()
        }

    def top(self, site: Site, feature: int) -> list[tuple[np.float32, int, int]]:
        """(value, index of context, position) of the strongest contexts, each at its first maximum."""
        codes = site.codes[:, :, feature]
        best = [(codes[i].max(), i, int(codes[i].argmax())) for i in range(len(codes)) if codes[i].max() > 0]
        return sorted(best, key=lambda entry: (-entry[0], entry[1]))[: self.config.sampling.top]

    def around(self, index: int, position: int) -> tuple[int | None, ...]:
        """The tokens by which near duplicates are told, None where the span has none."""
        context, sampling = self.contexts[index], self.config.sampling
        start, stop = context.window(position, sampling.before, sampling.after)
        places = range(position - NEAR_BEFORE, position + NEAR_AFTER)
        return tuple(context.ids[p] if start <= p < stop else None for p in places)


class _Sae:
    """An SAELens directory read by hand, evaluated densely."""

    def __init__(self, chosen: SaeConfig):
        folder = Path(chosen.path)
        self.config = json.loads((folder / "cfg.json").read_text())
        self.name = chosen.name or folder.name
        self.hook_point = self.config["metadata"]["hook_name"]
        self.layer = int(self.hook_point.split(".")[1])
        tensors = load_file(folder / "sae_weights.safetensors")
        self.w_enc, self.w_dec, self.b_enc, self.b_dec = (tensors[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec"))
        self.threshold = tensors.get("threshold")

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense codes and the reconstruction, both (B, T, …)."""
        u = x.flatten(0, 1)
        mean = deviation = None
        if self.config["normalize_activations"] == "layer_norm":
            mean = u.mean(dim=1, keepdim=True)
            deviation = (u - mean).std(dim=1, keepdim=True)
            u = (u - mean) / (deviation + 1e-5)
        if self.config["apply_b_dec_to_input"]:
            u = u - self.b_dec
        pre = torch.addmm(self.b_enc, u, self.w_enc)
        z = torch.zeros_like(pre)
        if self.config["architecture"] == "topk":
            for token, row in enumerate(pre.numpy()):
                best = sorted(range(len(row)), key=lambda f: (-row[f], f))[: self.config["k"]]
                z[token, best] = pre[token, best].clamp(min=0)
        else:
            z = pre * (pre > self.threshold)
        y = z @ self.w_dec + self.b_dec
        if deviation is not None:
            y = y * deviation + mean
        return z.view(*x.shape[:2], -1), y.view(x.shape)


def octave(value: float) -> int:
    """e with 2**e <= value < 2**(e + 1)."""
    return math.frexp(value)[1] - 1


def _is_sink(x: np.ndarray, median: np.float32) -> bool:
    energy = [float(value) ** 2 for value in x]
    ratio = math.sqrt(math.fsum(energy)) / float(median) if median else math.inf * math.fsum(energy)
    return ratio > 10 or (ratio > 2 and max(energy) > math.fsum(energy) / 2)


def _norms(x: np.ndarray) -> list[list[np.float32]]:
    return [list(row.norm(dim=1).numpy()) for row in torch.from_numpy(x)]


def _mean(values: np.ndarray) -> float:
    return math.fsum(values) / len(values) if len(values) else 0.0


def _nearest_rank(ascending: list[float], percent: int) -> float:
    """The value of rank ceil(percent * n / 100), in integers."""
    return ascending[-(-percent * len(ascending) // 100) - 1] if ascending else 0.0
