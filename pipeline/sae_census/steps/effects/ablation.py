"""Zero one feature over a sample of its spans: what happens to the loss and to logits, beside a control.

Every span is run in its whole context up to its end, three times: as it was analysed; with the feature zeroed at
every counted token of the context; and, as a control, with those tokens moved as far along the decoder row of
another feature. Batches are cut inside one feature, so results do not depend on how features are shared out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from sae_census.compute.census import masks
from sae_census.compute.effects.edits import Edit, edit
from sae_census.compute.effects.effects import centred, losses, most_lowered
from sae_census.config import AnalyzeConfig
from sae_census.errors import CensusError
from sae_census.io.model import device
from sae_census.io.model.device import choose_device
from sae_census.io.model.hooks import layout_of
from sae_census.io.model.interventions import Function, Interventions
from sae_census.io.store import tables
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.model.provenance import Provenance
from sae_census.steps.model.reader import Reader
from sae_census.steps.store import layout
from sae_census.types import SiteKey

_SHARDS_HELD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanAddress:
    """Where a span of a catalog is."""

    shard_id: str
    context_id: int
    position: int
    """Of its peak."""
    stop: int
    """One past its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationTask:
    """One feature and its spans."""

    site: SiteKey
    feature_id: int
    spans: tuple[SpanAddress, ...]
    """At least one."""
    token_ids: tuple[int, ...] | None
    """Whose logits are followed; None: those that become least likely on the spans with even index, followed on
    the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What zeroing a feature did. Every change is what it became less what it was."""

    codes: Float32[np.ndarray, " N"]
    """At the peak of each span, computed again."""
    loss: Float64[np.ndarray, " L"]
    """Change in nats a token, over the tokens after the peak; of the spans that do not end with their peak."""
    control_loss: Float64[np.ndarray, " L"]
    token_ids: tuple[int, ...]
    """Whose logits were followed."""
    logit: Float64[np.ndarray, " M"]
    """Mean change of those logits at the peak, less that of the whole vocabulary; of the spans that followed."""
    control_logit: Float64[np.ndarray, " M"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    codes: Float[Tensor, " n"]
    loss: Float[Tensor, "2 n"]
    """Of the ablation and of the control; NaN for spans that end with their peak."""
    logits: Float[Tensor, "2 n V"]
    """Change at the peak, centred; of the ablation and of the control."""
    chances: Float[Tensor, "n V"]
    """Change of the probability of each next token at the peak by the ablation."""


class Ablator:
    """Holds a whole model and SAEs, and ablates features."""

    def __init__(
        self,
        config: AnalyzeConfig,
        preparation_id: str,
        planned: Provenance,
        *,
        num_rows: int,
        num_tokens: int,
        seed: int,
    ):
        """Load everything.

        Args:
            config: of the catalog; its store holds the shards.
            preparation_id: names their folder.
            planned: what model, tokenizer and SAEs have to be.
            num_rows: contexts of one forward pass.
            num_tokens: how many tokens to choose where a task names none.
            seed: of the control's features.

        Raises:
            IdentityError: if one of them is another.
        """
        self._config, self._preparation_id = config, preparation_id
        self._num_rows, self._num_tokens, self._seed = num_rows, num_tokens, seed
        self._blobs = LocalBlobs(config.store.root)
        device.configure(config.cluster.threads_per_worker, choose_device(config.model.device))
        self._reader = Reader(config.model, config.saes, planned)
        self._blocks, self._taps = layout_of(self._reader.model.inner)
        self._shards: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def run(self, task: AblationTask) -> Ablation:
        """Ablate one feature.

        Raises:
            CensusError: if the model no longer gives finite predictions.
        """
        order = sorted(range(len(task.spans)), key=lambda i: (task.spans[i].stop, i))  # like lengths share a batch
        batches = [order[start : start + self._num_rows] for start in range(0, len(order), self._num_rows)]
        directions = self._control_directions(task)
        with torch.inference_mode():
            parts = [self._measure(task, [task.spans[i] for i in batch], directions[batch]) for batch in batches]
        back = torch.tensor(order).argsort()
        loss = torch.cat([part.loss for part in parts], dim=1).double().numpy()
        logits = torch.cat([part.logits for part in parts], dim=1)[:, back]
        if not torch.isfinite(logits).all():
            raise CensusError(f"zeroing feature {task.feature_id} of {task.site} makes predictions NaN or infinite")
        if task.token_ids is None:
            chances = torch.cat([part.chances for part in parts])[back]
            token_ids, logits = most_lowered(chances[0::2], self._num_tokens), logits[:, 1::2]
        else:
            token_ids = torch.tensor(task.token_ids)
        followed = logits[:, :, token_ids].mean(dim=2).double().numpy()
        known = np.isfinite(loss[0])
        return Ablation(
            codes=torch.cat([part.codes for part in parts])[back].numpy(),
            loss=loss[0, known],
            control_loss=loss[1, known],
            token_ids=tuple(token_ids.tolist()),
            logit=followed[0],
            control_logit=followed[1],
        )

    def _control_directions(self, task: AblationTask) -> Float[Tensor, "N D"]:
        """For every span the unit decoder row of another feature, drawn from the seed and the feature's name."""
        sae = self._reader.saes[task.site]
        name = f"{self._seed}/{task.site}/{task.feature_id}".encode()
        generator = np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:8]))
        norms = sae.decoder_norms().cpu().numpy()
        others = np.flatnonzero((norms > 0) & (np.arange(len(norms)) != task.feature_id))
        chosen = torch.from_numpy(generator.choice(others, len(task.spans))).to(self._reader.device)
        return torch.nn.functional.normalize(sae.w_dec[chosen], dim=1)

    def _measure(self, task: AblationTask, spans: Sequence[SpanAddress], directions: Float[Tensor, "n D"]) -> _Measured:
        """Three forwards over the contexts of some spans."""
        sae = self._reader.saes[task.site]
        input_ids, num_tokens = self._contexts(spans)
        rows = torch.arange(len(spans), device=self._reader.device)
        peaks = torch.tensor([span.position for span in spans], device=self._reader.device)
        lengths = torch.zeros(0)
        codes = torch.zeros(0)

        def ablate(x: Tensor) -> Tensor:
            nonlocal lengths, codes
            flat = x.flatten(0, 1)
            where = torch.from_numpy(self._counted(input_ids, num_tokens, x)).to(x.device).flatten()
            new = edit(sae, flat, [Edit(feature=task.feature_id, value=0, mode="set")], where=where).x
            lengths = (new.float() - flat.float()).norm(dim=1).view(x.shape[:2])
            codes = sae.codes_of(x[rows, peaks], torch.tensor([task.feature_id], device=x.device))[:, 0].cpu()
            return new.view(x.shape)

        def control(x: Tensor) -> Tensor:
            return (x - lengths[:, :, None] * directions[:, None]).to(x.dtype)

        before = self._predict(task.site, None, input_ids, spans)
        after = [self._predict(task.site, function, input_ids, spans) for function in (ablate, control)]
        return _Measured(
            codes=codes,
            loss=torch.stack([loss - before[0] for loss, _ in after]),
            logits=torch.stack([logits - before[1] for _, logits in after]),
            chances=after[0][1].softmax(dim=1) - before[1].softmax(dim=1),
        )

    def _predict(
        self, site: SiteKey, function: Function | None, input_ids: np.ndarray, spans: Sequence[SpanAddress]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n V"]]:
        """Loss of each span after its peak (NaN if nothing is there) and centred logits at its peak."""
        functions = {} if function is None else {site.hook_point: function}
        with Interventions(self._blocks, self._taps, functions):
            ids = torch.from_numpy(input_ids).to(self._reader.device)
            logits = self._reader.model.inner(input_ids=ids, use_cache=False).logits
        loss = torch.full((len(spans),), torch.nan)
        for row, span in enumerate(spans):
            if span.stop > span.position + 1:
                predicted, targets = logits[row, span.position : span.stop - 1], ids[row, span.position + 1 : span.stop]
                loss[row] = losses(predicted, targets).mean().cpu()
        peaks = torch.stack([logits[row, span.position] for row, span in enumerate(spans)])
        return loss, centred(peaks).cpu()

    def _contexts(self, spans: Sequence[SpanAddress]) -> tuple[Int64[np.ndarray, "n T"], Int64[np.ndarray, " n"]]:
        """Token ids of the spans' contexts, each up to its span's end, right-padded; and their lengths."""
        num_tokens = np.array([span.stop for span in spans], np.int64)
        input_ids = np.full((len(spans), num_tokens.max()), self._reader.fill_id, np.int64)
        for row, span in enumerate(spans):
            start, ids = self._shard(span.shard_id)
            first = start[span.context_id]
            input_ids[row, : span.stop] = ids[first : first + span.stop]
        return input_ids, num_tokens

    def _shard(self, shard_id: str) -> tuple[np.ndarray, np.ndarray]:
        if shard_id not in self._shards:
            if len(self._shards) >= _SHARDS_HELD:
                self._shards.clear()
            path = self._blobs.path(layout.shard(self._preparation_id, shard_id))
            self._shards[shard_id] = tables.ragged(tables.read(path, ["input_ids"]), "input_ids")
        return self._shards[shard_id]

    def _counted(
        self, input_ids: Int64[np.ndarray, "n T"], num_tokens: Int64[np.ndarray, " n"], x: Tensor
    ) -> Bool[np.ndarray, "n T"]:
        """The tokens that the census counted: what fires elsewhere is no code, and is left alone."""
        chosen = self._config.masks
        rules = masks.token_rules(
            input_ids,
            num_tokens,
            special_ids=self._reader.tokenizer.special_ids if chosen.special_tokens else (),
            first_positions=chosen.first_positions,
            positions=chosen.positions,
        )
        counted: np.ndarray = rules == masks.COUNTED
        if chosen.max_norm_ratio is not None:
            counted &= ~masks.norm_outliers(x, num_tokens, chosen.max_norm_ratio)
        if chosen.attention_sinks:
            real = np.arange(x.shape[1]) < num_tokens[:, None]
            counted &= ~masks.attention_sinks(*masks.sizes(x), real)
        return counted
