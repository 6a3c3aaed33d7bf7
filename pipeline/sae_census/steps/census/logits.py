"""Attribute logits to features: by range, as a unit of work that can be retried, and at once, for notebooks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_census.compute.numbers.logits import DEFINITIONS, LogitEffects, Mode, Writing, logit_effects
from sae_census.config import DirectLogitAttributorConfig, LogitsConfig, ModelConfig, SaeConfig
from sae_census.errors import ConfigError
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.model import device
from sae_census.io.model.device import choose_device
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.model.unembedding import check_path, read_unembedding, read_writing
from sae_census.io.store import schemas, tables
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.census import ranges
from sae_census.steps.census.partial import RangeTask
from sae_census.steps.model.parts import model_of
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import load_saes
from sae_census.steps.store.manifests import LogitFacts
from sae_census.types import HookPoint, SiteKey

LOGITS, MOMENTS = "logits.parquet", "logit_moments.parquet"
"""The files of an attribution. Moments have a table of their own: the columns of `features.parquet` are those of
every catalog, and `statistics.zarr` holds what is summed over a corpus."""


def check_request(logits: LogitsConfig, points: Iterable[HookPoint], tokenizer: Tokenizer) -> None:
    """Raises ConfigError if what is asked for cannot be computed; nothing is loaded."""
    if not logits.top_k:
        return
    if logits.top_k > tokenizer.size:
        raise ConfigError(f"logits.top_k is {logits.top_k}, but the tokenizer has only {tokenizer.size} tokens")
    for point in points:
        check_path(point)


class Unembedder:
    """The ways from the streams of one loaded model to its logits."""

    def __init__(self, model: LanguageModel):
        self._inner, self._device = model.inner, model.device
        self.tokenizer = model.tokenizer
        self._unembedding = read_unembedding(model.inner, self.tokenizer.size)
        self._writings: dict[HookPoint, Writing] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that have a logit and a text."""
        return len(self._unembedding.weight)

    @property
    def num_padding(self) -> int:
        """Rows of the unembedding that no token of the tokenizer has."""
        return len(self._inner.get_output_embeddings().weight) - self.num_tokens

    def effects(self, loaded: LoadedSae, start: int, stop: int, *, top_k: int, mode: Mode) -> LogitEffects:
        """The direct effects of a range of features.

        Raises:
            ConfigError: if they have no direct path to the logits, or the SAE is of another width.
        """
        point = loaded.hook_point
        if point not in self._writings:
            self._writings[point] = read_writing(self._inner, point)
        writing, w_dec = self._writings[point], loaded.sae.w_dec
        width = len(self._unembedding.norm.gain if writing.matrix is None else writing.matrix)
        if w_dec.shape[1] != width:
            raise ConfigError(
                f"the decoder of SAE {loaded.name} is {w_dec.shape[1]} wide, but what it writes at {point} is {width} "
                "wide; is this the SAE of another model or hook point?"
            )
        rows = writing.rows(w_dec[start:stop].to(self._device))
        return logit_effects(rows, self._unembedding, top_k=top_k, mode=mode)


class DirectLogitAttributor:
    """The tokens that every feature of an SAE promotes and suppresses most, by the direct path to the logits.

    >>> from sae_census import DirectLogitAttributorConfig
    >>> attributor = DirectLogitAttributor(DirectLogitAttributorConfig(top_k=2))
    >>> found = attributor.direct_logit_attribute(sae, model)
    >>> len(found), sorted(found[0]), len(found[0]["top_positive"])
    (96, ['top_negative', 'top_positive'], 2)
    >>> sorted(found[0]["top_positive"][0])
    ['logit', 'token']
    """

    def __init__(self, cfg: DirectLogitAttributorConfig):
        """Keep the settings.

        Args:
            cfg: how many tokens of each sign, and through which norm.
        """
        self.cfg = cfg

    def direct_logit_attribute(
        self, sae: LoadedSae, model: LanguageModel, layer_idx: int | None = None
    ) -> list[dict[str, list[dict[str, Any]]]]:
        """Attribute every feature, in the order of features.

        Args:
            sae: as from `load_sae`, at any hook point but the input of an MLP.
            model: with its head.
            layer_idx: for cross-layer transcoders; of any other SAE None, or the layer where it is.

        Returns:
            For each feature `top_positive`, the largest logits first, and `top_negative`, the smallest first: each
            a list of `{"token": text, "logit": number}`, ties by token id.

        Raises:
            NotImplementedError: if `sae` is of an unsupported type.
            ConfigError: if the SAE has no direct path to the logits, or belongs to another layer or model.
        """
        if not isinstance(sae, LoadedSae):
            raise NotImplementedError(
                f"direct logit attribution of {type(sae).__name__} is not supported; expected an SAE as load_sae "
                "returns it (cross-layer transcoders, crosscoders and attention SAEs with heads are not read)"
            )
        for name, layer in (("layer_idx", layer_idx), ("clt_layer", self.cfg.clt_layer)):
            if layer not in (None, sae.hook_point.layer):
                raise ConfigError(
                    f"{name} is {layer}, but SAE {sae.name} is no cross-layer transcoder: it is at {sae.hook_point}; "
                    f"leave {name} out"
                )
        unembedder = Unembedder(model)
        found: list[dict[str, list[dict[str, Any]]]] = []
        for task in ranges.tasks([sae.sae.num_features]):
            effects = unembedder.effects(sae, task.start, task.stop, top_k=self.cfg.top_k, mode=self.cfg.mode)
            positive = _listed(effects.positive_token, effects.positive_logit, unembedder.tokenizer)
            negative = _listed(effects.negative_token, effects.negative_logit, unembedder.tokenizer)
            found += [{"top_positive": p, "top_negative": n} for p, n in zip(positive, negative, strict=True)]
        return found


def _listed(token: np.ndarray, logit: np.ndarray, tokenizer: Tokenizer) -> list[list[dict[str, Any]]]:
    texts = _texts(token, tokenizer)
    return [
        [{"token": texts[t], "logit": value} for t, value in zip(*row, strict=True)]
        for row in zip(token.tolist(), logit.tolist(), strict=True)
    ]


def _texts(token: np.ndarray, tokenizer: Tokenizer) -> dict[int, str]:
    """The text of every token that occurs."""
    ids = np.unique(token).tolist()
    return dict(zip(ids, tokenizer.tokens(ids), strict=True))


PEAKED = 1.0
"""Excess kurtosis of a feature's logits above which its strongest tokens say something of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitSettings:
    """What a worker needs to attribute any range."""

    model: ModelConfig
    saes: tuple[SaeConfig, ...]
    logits: LogitsConfig
    threads: int
    planned: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitResult:
    """The logits of a range of features."""

    task: RangeTask
    logits: bytes
    """Rows of `logits.parquet`."""
    moments: bytes
    """Rows of `logit_moments.parquet`."""
    num_tokens: int
    """Tokens of the vocabulary that were compared."""
    num_padding: int
    """Rows of the unembedding that are no token's, and were not."""


class LogitWorker:
    """Holds the model and the SAEs and attributes ranges one by one; sites are numbered in the order of keys."""

    def __init__(self, settings: LogitSettings):
        self._settings = settings
        model, chosen = settings.model, choose_device(settings.model.device)
        device.configure(settings.threads, chosen)
        self._saes = list(load_saes(settings.saes).items())
        loaded = model_of(model, chosen)
        settings.planned.prove(model.id, loaded.facts.digest, loaded.tokenizer, dict(self._saes))
        self._unembedder = Unembedder(loaded)

    def run(self, task: RangeTask) -> LogitResult:
        """Attribute one range."""
        site, loaded = self._saes[task.site]
        asked = self._settings.logits
        with torch.inference_mode():
            effects = self._unembedder.effects(loaded, task.start, task.stop, top_k=asked.top_k, mode=asked.mode)
        return LogitResult(
            task=task,
            logits=tables.ipc_bytes(_logit_rows(site, task, effects, self._unembedder.tokenizer)),
            moments=tables.ipc_bytes(_moment_rows(site, task, effects)),
            num_tokens=self._unembedder.num_tokens,
            num_padding=self._unembedder.num_padding,
        )


def _logit_rows(site: SiteKey, task: RangeTask, effects: LogitEffects, tokenizer: Tokenizer) -> tables.Table:
    """Rows by feature, sign and rank."""
    num_features, top_k = effects.positive_token.shape
    token = np.concatenate([effects.negative_token, effects.positive_token], axis=1).reshape(-1)
    texts = _texts(token, tokenizer)
    return tables.table(
        schemas.LOGITS,
        {
            "hook_point": [str(site.hook_point)] * len(token),
            "sae": [site.sae] * len(token),
            "feature_id": np.repeat(np.arange(task.start, task.stop), 2 * top_k),
            "sign": (["negative"] * top_k + ["positive"] * top_k) * num_features,
            "rank": np.tile(np.arange(1, top_k + 1), 2 * num_features),
            "token_id": token,
            "token": [texts[t] for t in token.tolist()],
            "logit": np.concatenate([effects.negative_logit, effects.positive_logit], axis=1).reshape(-1),
        },
    )


def _moment_rows(site: SiteKey, task: RangeTask, effects: LogitEffects) -> tables.Table:
    return tables.table(
        schemas.LOGIT_MOMENTS,
        {
            "hook_point": [str(site.hook_point)] * task.num_features,
            "sae": [site.sae] * task.num_features,
            "feature_id": np.arange(task.start, task.stop),
            "mean": effects.mean,
            "std": effects.std,
            "skewness": effects.skewness,
            "kurtosis": effects.kurtosis,
        },
    )


def write_tables(folder: Path, results: Iterator[LogitResult], asked: LogitsConfig) -> LogitFacts:
    """Write the files of an attribution and say what they mean.

    Args:
        folder: gets the files.
        results: of all ranges, in the order of sites and features; one is held at a time, but for moments.
        asked: what was attributed.
    """
    last: list[LogitResult] = []
    moments: list[tables.Table] = []

    def rows() -> Iterator[tables.Table]:
        for result in results:
            last[:] = [result]
            moments.append(tables.from_ipc(result.moments))
            yield tables.from_ipc(result.logits)

    tables.write(folder / LOGITS, schemas.LOGITS, rows())
    tables.write(folder / MOMENTS, schemas.LOGIT_MOMENTS, moments)
    return LogitFacts(
        top_k=asked.top_k,
        mode=asked.mode,
        definition=DEFINITIONS[asked.mode],
        num_tokens=last[0].num_tokens,
        num_padding=last[0].num_padding,
    )


def says(folder: Path, site: SiteKey, num_features: int) -> list[list[str]] | None:
    """For every feature of an SAE, the tokens that it promotes most, if its logits are peaked; None without logits."""
    if not (folder / LOGITS).exists():
        return None
    key = [("hook_point", "=", str(site.hook_point)), ("sae", "=", site.sae)]
    kurtosis = tables.read(folder / MOMENTS, ["kurtosis"], filters=key)["kurtosis"].to_pylist()
    tokens = top_tokens(folder, site, 0, num_features)
    return [found if peaked > PEAKED else [] for found, peaked in zip(tokens, kurtosis, strict=True)]


def top_tokens(folder: Path, site: SiteKey, start: int, stop: int) -> list[list[str]]:
    """The texts of the tokens that each feature of a range promotes most, best first, from written tables."""
    key = [("hook_point", "=", str(site.hook_point)), ("sae", "=", site.sae), ("sign", "=", "positive")]
    wanted = [*key, ("feature_id", ">=", start), ("feature_id", "<", stop)]
    found = tables.read(folder / LOGITS, ["feature_id", "token"], filters=wanted)
    texts: list[list[str]] = [[] for _ in range(start, stop)]
    for feature_id, token in zip(found["feature_id"].to_pylist(), found["token"].to_pylist(), strict=True):
        texts[feature_id - start].append(token)
    return texts
