"""A batch of requests is answered as single ones, in any order, and the same request gives the same bytes."""

import random
from typing import Any

import pytest
from discovery_bench import CLOSE, TEXT, bare, bench, catalog_bench, informed, of

from sae_census.config import DiscoverRequest
from sae_census.findings import Discovery


def assert_alike(one: Discovery, other: Discovery) -> None:
    assert one.analyzed == other.analyzed
    first, second = ({of(f): f for f in answer.features} for answer in (one, other))
    assert first.keys() == second.keys()
    for key, feature in first.items():
        assert feature.scores.model_dump() == pytest.approx(second[key].scores.model_dump(), rel=CLOSE, abs=CLOSE)
        assert [s.position for s in feature.top_spans] == [s.position for s in second[key].top_spans]


def many_requests() -> list[DiscoverRequest]:
    rng = random.Random(3)
    words = TEXT.split()
    fields: list[dict[str, Any]] = []
    for number in range(14):
        text = " ".join(rng.choices(words, k=rng.choice((1, 2, 4, 6))))
        kind = number % 4
        common = {"min_coverage_pct": 0.0, "return_top_x": 500, "topk_tokens_per_seq": (64, 5)[number % 2]}
        fields.append(
            common
            | [
                {"text": text},
                {"prompt": text, "gen_tokens": 6},
                {"prompt": text, "generate": False, "layers": [1]},
                {"prompt": text, "gen_tokens": 6, "do_sample": True, "seed": number},
            ][kind]
        )
    return [DiscoverRequest.model_validate(one) for one in fields]


def test_a_batch_answers_as_single_requests_do(bare):
    requests = many_requests()
    together = bare.discover_many(requests)
    for request, answer in zip(requests, together, strict=True):
        assert_alike(answer, bare.discover(request))
    assert [a.model_dump_json() for a in bare.discover_many(requests)] == [a.model_dump_json() for a in together]
    backwards = bare.discover_many(requests[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert_alike(one, other)


def test_the_same_request_gives_the_same_bytes(informed):
    request = DiscoverRequest(prompt="river water", gen_tokens=12, do_sample=True, min_coverage_pct=0.0)
    assert informed.discover(request).model_dump_json() == informed.discover(request).model_dump_json()
