"""Laws of packing, masks and ranks: no token is lost, doubled or booked twice, and ties have one order."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_census.compute.census import masks
from sae_census.compute.census.packing import Context, Packer
from sae_census.compute.numbers.scores import Score, ranks, score

BOS = 1
law = settings(max_examples=80)
lengths_of_documents = st.lists(st.integers(0, 25), max_size=8)
lengths_of_contexts = st.integers(2, 9)
bos_ids = st.sampled_from([None, BOS])


def documents_of(lengths: list[int]) -> list[tuple[str, list[int]]]:
    """Documents whose tokens say where they are from: 1000 * document + place + 100."""
    return [(f"d{i}", [1000 * i + place + 100 for place in range(length)]) for i, length in enumerate(lengths)]


def packed(
    lengths: list[int],
    length: int,
    packing: Literal["concat", "document"],
    bos_id: int | None,
    long_documents: Literal["chunk", "truncate"] = "chunk",
) -> tuple[list[Context], int]:
    packer = Packer(context_length=length, packing=packing, long_documents=long_documents, bos_id=bos_id)
    contexts = list(packer.pack(documents_of(lengths)))
    return contexts, packer.tokens_truncated


def runs(context: Context) -> list[tuple[str, list[int]]]:
    stops = [*context.document_starts[1:], len(context.input_ids)]
    return [
        (document, context.input_ids[start:stop])
        for document, start, stop in zip(context.document_ids, context.document_starts, stops, strict=True)
    ]


@law
@given(
    lengths_of_documents,
    lengths_of_contexts,
    st.sampled_from(["concat", "document"]),
    bos_ids,
    st.sampled_from(["chunk", "truncate"]),
)
def test_no_token_is_lost_or_doubled_and_every_truncated_one_is_counted(
    lengths: list[int],
    length: int,
    packing: Literal["concat", "document"],
    bos_id: int | None,
    long_documents: Literal["chunk", "truncate"],
) -> None:
    contexts, truncated = packed(lengths, length, packing, bos_id, long_documents)
    found: dict[str, list[int]] = {document: [] for document, _ in documents_of(lengths)}
    for context in contexts:
        assert 0 < len(context.input_ids) <= length
        assert context.document_starts == sorted(set(context.document_starts))
        assert context.document_starts[0] == 0
        for document, ids in runs(context):
            assert bos_id is None or ids[0] == bos_id
            assert BOS not in ids[bool(bos_id) :]
            found[document] += ids[bool(bos_id) :]
    cut = packing == "document" and long_documents == "truncate"
    room = length - bool(bos_id)
    assert found == {document: ids[:room] if cut else ids for document, ids in documents_of(lengths)}
    assert truncated == (sum(max(n - room, 0) for n in lengths) if cut else 0)


@law
@given(lengths_of_documents, lengths_of_contexts, bos_ids)
def test_joined_documents_fill_every_context_but_the_last(lengths: list[int], length: int, bos_id: int | None) -> None:
    contexts, _ = packed(lengths, length, "concat", bos_id)
    assert all(len(context.input_ids) == length for context in contexts[:-1])
    assert [run for context in contexts for run, _ in runs(context)] == sorted(
        (run for context in contexts for run, _ in runs(context)), key=lambda document: int(document[1:])
    )


@law
@given(lengths_of_documents, lengths_of_contexts, bos_ids, st.sampled_from(["chunk", "truncate"]))
def test_document_packing_gives_every_context_to_one_document(
    lengths: list[int], length: int, bos_id: int | None, long_documents: Literal["chunk", "truncate"]
) -> None:
    contexts, _ = packed(lengths, length, "document", bos_id, long_documents)
    assert all(len(context.document_ids) == 1 for context in contexts)
    room = length - bool(bos_id)
    per_document = [min(-(-n // room), 1) if long_documents == "truncate" else -(-n // room) for n in lengths]
    assert [sum(c.document_ids == [f"d{i}"] for c in contexts) for i in range(len(lengths))] == per_document


@law
@given(
    st.lists(st.integers(1, 25), max_size=8),
    lengths_of_contexts,
    st.sampled_from(["concat", "document"]),
    st.sampled_from(["chunk", "truncate"]),
    st.sets(st.integers(0, 7)),
)
def test_documents_that_bring_their_bos_are_packed_as_those_that_get_one(
    lengths: list[int],
    length: int,
    packing: Literal["concat", "document"],
    long_documents: Literal["chunk", "truncate"],
    bringing: set[int],
) -> None:
    def contexts(brought: set[int], *, doubles_bos: bool = False) -> list[Context]:
        packer = Packer(
            context_length=length,
            packing=packing,
            long_documents=long_documents,
            bos_id=BOS,
            doubles_bos=doubles_bos,
        )
        documents = documents_of(lengths)
        return list(packer.pack((d, [BOS] * (i in brought) + ids) for i, (d, ids) in enumerate(documents)))

    assert contexts(bringing) == contexts(set())
    if bringing & set(range(len(lengths))):
        assert contexts(bringing, doubles_bos=True) != contexts(set())


def test_a_run_that_goes_on_at_a_bos_inside_its_text_has_that_one() -> None:
    packer = Packer(context_length=4, packing="document", long_documents="chunk", bos_id=BOS)
    found = [context.input_ids for context in packer.pack([("d", [5, 6, 7, BOS, 8, BOS, 9, 10, 11])])]
    assert found == [[BOS, 5, 6, 7], [BOS, 8, BOS, 9], [BOS, 10, 11]]


# --- masks --------------------------------------------------------------------------------------------------

B, T = 4, 6
batches = st.lists(st.integers(0, 5), min_size=B * T, max_size=B * T).map(lambda ids: np.array(ids).reshape(B, T))
num_tokens_of = st.lists(st.integers(0, T), min_size=B, max_size=B).map(np.array)


@law
@given(batches, num_tokens_of, st.sets(st.integers(0, 5)), st.integers(0, T), st.sets(st.integers(0, T - 1)), st.data())
def test_every_token_is_booked_under_the_first_rule_that_excludes_it(
    input_ids: np.ndarray,
    num_tokens: np.ndarray,
    special: set[int],
    first_positions: int,
    positions: set[int],
    data: st.DataObject,
) -> None:
    outliers = np.array(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).reshape(B, T)
    rules = masks.token_rules(
        input_ids,
        num_tokens,
        special_ids=sorted(special),
        first_positions=first_positions,
        positions=sorted(positions),
    )
    rules = masks.with_rule(rules, outliers, "max_norm_ratio")
    sinks = np.array(data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))).reshape(B, T)
    rules = masks.with_rule(rules, sinks, "attention_sinks")
    tally = dict.fromkeys(("counted", *masks.RULES), 0)
    for row in range(B):
        for place in range(T):
            excluded_by = {
                "padding": place >= num_tokens[row],
                "special_tokens": int(input_ids[row, place]) in special,
                "first_positions": place < first_positions,
                "positions": place in positions,
                "max_norm_ratio": outliers[row, place],
                "attention_sinks": sinks[row, place],
            }
            rule = next((name for name in masks.RULES if excluded_by[name]), "counted")
            assert rules[row, place] == (masks.COUNTED if rule == "counted" else masks.RULES.index(rule))
            tally[rule] += 1
    assert masks.tally(rules) == tally
    assert sum(tally.values()) == B * T


@law
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, T), min_size=B, max_size=B), st.permutations(range(B)))
def test_a_context_judges_its_norms_by_its_own_lower_median_whatever_batch_it_is_in(
    seed: int, lengths: list[int], order: list[int]
) -> None:
    num_tokens = np.array(lengths)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.choice([1.0, 2.0, 3.0, 8.0], (B, T, 1)) * np.array([3.0, 4.0])).float()
    for row, n in enumerate(lengths):
        x[row, n:] = (torch.nan, torch.inf, 0.0, 50.0)[row]  # what stands in the padding must not matter
    found = masks.norm_outliers(x, num_tokens, 2.0)
    for row, n in enumerate(lengths):
        norms = x[row, :n].norm(dim=1).tolist()
        median = sorted(norms)[(n - 1) // 2]
        assert found[row].tolist() == [norm > 2 * median for norm in norms] + [False] * (T - n)
        assert np.array_equal(masks.norm_outliers(x[row : row + 1], num_tokens[row : row + 1], 2.0)[0], found[row])
    assert np.array_equal(masks.norm_outliers(x[order], num_tokens[order], 2.0), found[order])


def sinks_of(x: torch.Tensor, num_tokens: np.ndarray) -> np.ndarray:
    return masks.attention_sinks(*masks.sizes(x), np.arange(x.shape[1]) < num_tokens[:, None])


@law
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, T), min_size=B, max_size=B),
    st.permutations(range(B)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_sink_is_very_long_or_long_by_one_dimension_whatever_batch_it_is_in(
    seed: int, lengths: list[int], order: list[int], dtype: torch.dtype
) -> None:
    num_tokens, rng = np.array(lengths), np.random.default_rng(seed)
    # lengths and shares on both sides of the bounds, none so near to them that rounding decides
    length = rng.choice([0.0, 1.0, 1.2, 1.9, 2.1, 3.0, 9.0, 11.0, 40.0], (B, T, 1))
    share = rng.choice([0.1, 0.25, 0.4, 0.6, 0.95], (B, T, 1))
    rest = np.sqrt((1 - share) / 9) * rng.choice([-1, 1], (B, T, 9))
    x = torch.from_numpy(length * np.concatenate([rest[..., :4], -np.sqrt(share), rest[..., 4:]], axis=2)).to(dtype)
    for row, n in enumerate(lengths):
        x[row, n:] = (torch.nan, torch.inf, 0.0, 50.0)[row]  # what stands in the padding must not matter
    found = sinks_of(x, num_tokens)
    for row, n in enumerate(lengths):
        median = sorted(length[row, :n, 0])[(n - 1) // 2]
        expected = []
        for (norm,), (one,) in zip(length[row, :n], share[row, :n], strict=True):
            ratio = norm / median if median else np.inf * norm if norm else 0.0
            expected.append(bool(ratio > 10 or (ratio > 2 and max(one, (1 - one) / 9) > 0.5)))
        assert found[row].tolist() == expected + [False] * (T - n)
        assert np.array_equal(sinks_of(x[row : row + 1, :n], num_tokens[row : row + 1])[0], found[row, :n])
    assert np.array_equal(sinks_of(x[order], num_tokens[order]), found[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_no_sinks_where_no_token_stands_out(dtype: torch.dtype) -> None:
    spike = torch.eye(8)[:1].expand(4, 6, 8).to(dtype)  # all energy in one dimension, and all tokens alike
    for x in (torch.zeros(4, 6, 8, dtype=dtype), spike, 1e30 * spike, 1e-30 * spike):
        assert not sinks_of(x, np.array([6, 1, 0, 2])).any()
    assert not sinks_of(torch.full((1, 3, 2), 1e30), np.array([0])).any()


def test_the_bounds_themselves_are_no_sinks() -> None:
    x = torch.zeros(1, 5, 4)
    x[0, :3, 0] = 1
    x[0, 3, 0] = 10
    assert sinks_of(x, np.array([5])).tolist() == [[False, False, False, True, False]]
    x[0, 3] = torch.tensor([6.0, 6.0, 0.1, 0.0])  # over twice as long, just below half of the energy in a dimension
    assert not sinks_of(x, np.array([5])).any()
    x[0, 3] = torch.tensor([2.0, 0.0, 0.0, 0.0])  # twice as long, and no more
    assert not sinks_of(x, np.array([5])).any()
    x[0, 3] = torch.tensor([5.0, 5.0, 5.0, 5.0])  # ten times
    assert not sinks_of(x, np.array([5])).any()


def test_many_sinks_are_said_to_be_content() -> None:
    books = dict.fromkeys(("counted", *masks.RULES), 0) | {"counted": 94, "attention_sinks": 5, "padding": 900}
    assert masks.many_sinks(books | {"first_positions": 1}) == ""
    assert masks.many_sinks(books).startswith("5.1% of the tokens look like attention sinks")
    assert masks.many_sinks({"counted": 3}) == ""  # of receipts that are older than the rule


def test_a_context_of_padding_alone_has_no_outliers() -> None:
    assert not masks.norm_outliers(torch.full((1, 3, 2), 1e30), np.array([0]), 1.5).any()


# --- scores and ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 3.0, 2.0], [3, 1, 2]),
        ([5.0, 5.0, 7.0, 5.0], [2, 3, 1, 4]),
        ([0.0, 0.5, 0.0, -0.0], [2, 1, 3, 4]),
        ([2.0, 1.0] * 500, [*np.arange(1000).reshape(2, 500).T.reshape(-1) + 1]),
        ([], []),
    ],
)
def test_ranks_are_one_for_the_highest_and_break_ties_by_the_lowest_id(
    scores: list[float], expected: list[int]
) -> None:
    assert ranks(np.array(scores, np.float64)).tolist() == expected


SCORES: tuple[Score, ...] = ("frequency", "mean", "max", "mean_when_firing", "mean_x_coverage", "surprise")


def columns_of(count: list[int], num_tokens: int) -> dict[str, np.ndarray]:
    counts = np.array(count)
    fires = counts > 0
    return {
        "count": counts,
        "frequency": counts / num_tokens,
        "mean": 2.0 * counts / num_tokens,
        "max": np.where(fires, 3.0, 0.0),
        "mean_when_firing": np.where(fires, 2.0, 0.0),
    }


@pytest.mark.parametrize("name", SCORES)
def test_dead_features_score_nothing_and_come_last(name: Score) -> None:
    scores = score(columns_of([0, 5, 0, 9, 1], num_tokens=10), name)
    assert scores[[0, 2]].tolist() == [0.0, 0.0]
    assert (scores[[1, 3, 4]] > 0).all()
    assert ranks(scores)[[0, 2]].tolist() == [4, 5]


@pytest.mark.parametrize(
    "name",
    SCORES,
)
def test_a_feature_that_fires_on_every_token_still_ranks_before_a_dead_one(name: Score) -> None:
    assert ranks(score(columns_of([0, 10], num_tokens=10), name)).tolist() == [2, 1]


def test_scores_are_what_their_definitions_say() -> None:
    columns = columns_of([0, 4], num_tokens=16)
    assert score(columns, "mean_x_coverage")[1] == 0.5 * 0.25
    assert score(columns, "surprise")[1] == pytest.approx(2.0 * 2 * 4 / 104)  # mean when firing, bits, belief
