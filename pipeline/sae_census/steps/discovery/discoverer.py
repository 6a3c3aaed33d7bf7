"""Answer discovery requests with one loaded model: tokens, continuation, codes, then the answer."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sae_census.config import DiscoverRequest
from sae_census.errors import CensusError, ConfigError, RequestError
from sae_census.findings import Discovery
from sae_census.io.model import generation
from sae_census.io.model.generation import Patience
from sae_census.io.store.memo import ArrayCache
from sae_census.steps.discovery.answer import Answer, allowed_tokens
from sae_census.steps.discovery.codebook import Codebook
from sae_census.steps.discovery.requests import Loaded, sites_of
from sae_census.steps.discovery.sequences import Sequence as Tokens
from sae_census.steps.discovery.sequences import continued, sequence_of
from sae_census.types import SiteKey

GENERATE_ROWS = 16
"""Prompts that are continued together."""


class Discoverer:
    """Answers requests, one by one or many at once."""

    def __init__(self, loaded: Loaded, cache: ArrayCache | None = None):
        self._loaded, self._cache = loaded, cache
        self._codes = Codebook(loaded.reader, loaded.identity, cache)

    @property
    def model_id(self) -> str:
        """What requests call the model."""
        return self._loaded.model_id

    def describe(self) -> list[dict[str, Any]]:
        """The SAEs that can be asked for."""
        return [
            {
                "sae_id": site.sae,
                "layer": site.hook_point.layer,
                "stream": site.hook_point.stream,
                "num_features": sae.num_features,
            }
            for site, sae in self._loaded.reader.saes.items()
        ]

    def discover(self, request: DiscoverRequest, patience: Patience | None = None) -> Discovery:
        """The answer to one request; the same request gives the same bytes.

        Args:
            request: what is asked.
            patience: when to give up generating.

        Raises:
            RequestError: naming the field that cannot be answered.
            DeadlineError: if patience is over.
        """
        sites, sequence = sites_of(request, self._loaded), self._tokens(request)
        if sequence.mode == "prompt+gen":
            sequence = self._continued(request, sequence, patience)
        read = self._codes.read(sequence.ids, sites, entropy=self._needs_entropy(request, sequence))
        return Answer(self._loaded, request, sites, sequence, read).make()

    def discover_many(self, requests: Sequence[DiscoverRequest]) -> list[Discovery | CensusError]:
        """The answer to each request, or why there is none; passes are batched, and the cache is not used.

        Batches depend on nothing but `requests`. Padding changes the last bits of activations, and in low
        precision now and then a greedy continuation.
        """
        answers: dict[int, Discovery | CensusError] = {}
        sequences: dict[int, Tokens] = {}
        sites: dict[int, list[SiteKey]] = {}
        for i, request in enumerate(requests):
            try:
                sites[i], sequences[i] = sites_of(request, self._loaded), self._tokens(request)
            except RequestError as error:
                answers[i] = error
        for batch in _alike(requests, sequences):
            new = self._generated(requests[batch[0]], [sequences[i] for i in batch], None)
            for i, ids in zip(batch, new, strict=True):
                sequences[i] = continued(sequences[i], ids, self._loaded.reader.tokenizer)
        ways: dict[tuple[bool, tuple[SiteKey, ...]], list[int]] = {}
        for i, sequence in sequences.items():
            ways.setdefault((self._needs_entropy(requests[i], sequence), tuple(sites[i])), []).append(i)
        for (entropy, points), mine in ways.items():
            for place, read in self._codes.read_many([sequences[i].ids for i in mine], points, entropy=entropy):
                i = mine[place]
                answers[i] = (
                    read
                    if isinstance(read, CensusError)
                    else Answer(self._loaded, requests[i], points, sequences[i], read).make()
                )
        return [answers[i] for i in range(len(requests))]

    def _tokens(self, request: DiscoverRequest) -> Tokens:
        model = self._loaded.reader.model
        sequence = sequence_of(request, self._loaded.reader.tokenizer, self._loaded.max_tokens)
        try:
            model.check_ids(torch.tensor(sequence.ids))
        except ConfigError as error:
            raise RequestError(str(error), "text" if sequence.mode == "text" else "prompt") from error
        if model.is_headless and (sequence.mode == "prompt+gen" or self._needs_entropy(request, sequence)):
            raise RequestError(
                "the model was saved without its head: it continues nothing and knows no entropy; use generate=false "
                "with token_filter=norm or none",
                "generate" if sequence.mode == "prompt+gen" else "token_filter",
            )
        return sequence

    def _needs_entropy(self, request: DiscoverRequest, sequence: Tokens) -> bool:
        """Where every token is kept, nothing has to be known of them."""
        num_allowed = int(allowed_tokens(self._loaded, request, sequence).sum())
        return request.token_filter == "entropy" and num_allowed > request.topk_tokens_per_seq

    def _continued(self, request: DiscoverRequest, sequence: Tokens, patience: Patience | None) -> Tokens:
        """The sequence with its continuation, which the cache may know."""
        sampling = (request.temperature, request.top_p, request.seed) if request.do_sample else None
        ends = generation.end_ids(self._loaded.reader.model)
        key = [self._loaded.identity, "generated", sequence.ids, request.gen_tokens, sampling, ends]
        known = self._cache.get(key) if self._cache else None
        if known is None:
            known = {"ids": np.array(self._generated(request, [sequence], patience)[0], np.int64)}
            if self._cache:
                self._cache.put(key, known)
        return continued(sequence, known["ids"].tolist(), self._loaded.reader.tokenizer)

    def _generated(
        self, request: DiscoverRequest, sequences: Sequence[Tokens], patience: Patience | None
    ) -> list[list[int]]:
        return generation.generate(
            self._loaded.reader.model,
            [sequence.ids for sequence in sequences],
            pad_id=self._loaded.reader.fill_id,
            max_new_tokens=request.gen_tokens,
            do_sample=request.do_sample,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            patience=patience,
        )


def _alike(requests: Sequence[DiscoverRequest], sequences: Mapping[int, Tokens]) -> list[list[int]]:
    """Requests that can be continued together, of about equal length."""

    def settings(i: int) -> tuple[Any, ...]:
        one = requests[i]
        return one.gen_tokens, one.do_sample, one.temperature, one.top_p, one.seed

    mine = [i for i, sequence in sequences.items() if sequence.mode == "prompt+gen"]
    ordered = sorted(mine, key=lambda i: (settings(i), len(sequences[i].ids), i))
    batches = []
    for _, group in itertools.groupby(ordered, key=settings):
        together = list(group)
        batches += [together[n : n + GENERATE_ROWS] for n in range(0, len(together), GENERATE_ROWS)]
    return batches
