"""Proto-labels say what was planted, nothing about noise, and the same however the work is cut."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sae_census.compute.census import labels
from sae_census.compute.census import words as rules
from sae_census.compute.census.labels import MAX_CHARACTERS, START, normal_form, proto_label, visible
from sae_census.compute.census.words import MIN_COUNT, MIN_Z, NEAR, PLACES, PRIOR, Place, SpanTokens, over_represented
from sae_census.config import AnalyzeConfig
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze

SITES = (("blocks.0.hook_resid_post", "early"), ("blocks.1.hook_resid_post", "late"))
EASY_Z = 0.5
Found = dict[int, list[tuple[float, str, int, str]]]


@dataclass(frozen=True, kw_only=True)
class Span:
    feature: int
    context: int
    peak: int
    tokens: tuple[str, ...]


def tally_of(spans: Sequence[Span], num_features: int) -> labels.Tally:
    vocabulary = sorted({token for span in spans for token in span.tokens})
    index = {token: i for i, token in enumerate(vocabulary)}
    tokens = SpanTokens(
        feature=np.array([span.feature for span in spans], np.int64),
        context=np.array([span.context for span in spans], np.int64),
        peak=np.array([span.peak for span in spans], np.int64),
        start=np.cumsum([0, *(len(span.tokens) for span in spans)]),
        token=np.array([index[token] for span in spans for token in span.tokens], np.int64),
    )
    return labels.tally(tokens, vocabulary, num_features)


def slow_words(spans: Sequence[Span], num_features: int, min_z: float = MIN_Z) -> dict[Place, Found]:
    """Per place and feature: z, word, count and most frequent token, best first; from dense counts."""
    events: dict[Place, list[tuple[int, str]]] = {place: [] for place in PLACES}
    tokens: dict[Place, list[tuple[int, str]]] = {place: [] for place in PLACES}
    near_words, near_tokens = set(), set()
    for span in spans:
        before = span.tokens[span.peak - 1] if span.peak else START
        for place, token in (("peak", span.tokens[span.peak]), ("after", before)):
            events[place].append((span.feature, normal_form(token)))
            tokens[place].append((span.feature, token))
        for i, token in enumerate(span.tokens):
            if i != span.peak and span.peak - NEAR[0] <= i <= span.peak + NEAR[1]:
                near_words.add((span.feature, span.context, normal_form(token)))
                near_tokens.add((span.feature, span.context, token))
    events["near"] = [(feature, word) for feature, _, word in near_words]
    tokens["near"] = [(feature, token) for feature, _, token in near_tokens]
    return {place: slow_found(events[place], tokens[place], num_features, min_z) for place in PLACES}


def slow_found(events: list[tuple[int, str]], tokens: list[tuple[int, str]], num_features: int, min_z: float) -> Found:
    words = sorted({word for _, word in events})
    y = np.zeros((num_features, len(words)))
    for feature, word in events:
        y[feature, words.index(word)] += 1
    n, pool = y.sum(axis=1, keepdims=True), y.sum(axis=0, keepdims=True)
    alpha = PRIOR * n * pool / pool.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = np.log((y + alpha) / (n + PRIOR * n - y - alpha))
        delta -= np.log((pool + alpha) / (pool.sum() + PRIOR * n - pool - alpha))
        z = np.round(delta / np.sqrt(1 / (y + alpha) + 1 / (pool + alpha)), 9)
    forms = Counter(tokens)
    found: Found = {}
    for feature in range(num_features):
        mine = []
        for column, word in enumerate(words):
            if y[feature, column] >= MIN_COUNT and z[feature, column] > min_z and (pool[0, column] < pool.sum()):
                among = [(-c, t) for (f, t), c in forms.items() if f == feature and normal_form(t) == word]
                mine.append((z[feature, column], word, int(y[feature, column]), min(among)[1]))
        found[feature] = sorted(mine, key=lambda entry: (-entry[0], entry[1]))
    return found


def slow_labels(spans: Sequence[Span], num_features: int, min_z: float = MIN_Z) -> list[str | None]:
    found, lines = slow_words(spans, num_features, min_z), []
    for feature in range(num_features):
        num_spans = sum(span.feature == feature for span in spans)
        peak, after, near = ([token for *_, token in found[place][feature]] for place in PLACES)
        few = sum(count for _, _, count, _ in found["peak"][feature][:4]) < num_spans / 2
        lines.append(proto_label(peak, after, near, has_others=few) if num_spans else None)
    return lines


COMMON = (
    " the",
    "The",
    " a",
    " of",
    ",",
    "\n",
    "\n    ",
    "\n        ",
    "1",
    "ing",
    "é",
    "�",
    "---",
    "------",
    " x",
    "\t",
)


def noise(rng: np.random.Generator, num_features: int, per_feature: int, vocabulary: Sequence[str]) -> list[Span]:
    """Spans of which nothing can be said: tokens by Zipf's law, peaks anywhere."""
    weight = 1 / np.arange(1, len(vocabulary) + 1)
    num_spans = num_features * per_feature
    tokens = rng.choice(vocabulary, size=(num_spans, 24), p=weight / weight.sum()).tolist()
    lengths, contexts = rng.integers(1, 24, num_spans).tolist(), rng.integers(40, size=num_spans).tolist()
    return [
        Span(feature=i // per_feature, context=context, peak=int(rng.integers(length)), tokens=tuple(row[:length]))
        for i, (row, length, context) in enumerate(zip(tokens, lengths, contexts, strict=True))
    ]


def planted(rng: np.random.Generator, num_features: int = 12) -> list[Span]:
    """Noise, but feature 2 peaks on "except", 3 after "import", 4 near "try", 5 at the start; 1 is dead."""
    spans = [
        span for span in noise(rng, num_features, 30, [*COMMON, *(f"w{i}" for i in range(200))]) if span.feature != 1
    ]

    def plant(span: Span, offset: int, token: str) -> Span:
        tokens = ["a", "b", "c", *span.tokens, "d"]
        peak = span.peak + 3
        tokens[peak + offset] = token
        return Span(feature=span.feature, context=span.context, peak=peak, tokens=tuple(tokens))

    for i, span in enumerate(spans):
        if span.feature == 2 and i % 4:
            spans[i] = plant(span, 0, "Except" if i % 3 == 0 else " except")
        elif span.feature == 3 and i % 4:
            spans[i] = plant(span, -1, " import")
        elif span.feature == 4 and i % 4:
            spans[i] = plant(span, -2 if i % 2 else 1, "try")
        elif span.feature == 5:
            spans[i] = Span(feature=5, context=span.context, peak=0, tokens=span.tokens)
        else:
            spans[i] = plant(span, 1, ".")
    return spans


def test_planted_words_are_found_where_they_stand() -> None:
    found = labels.proto_labels(tally_of(planted(np.random.default_rng(0)), 12))
    assert found[1] is None
    assert found[2:6] == ["except", "after import", "near try", "after ⟨start⟩"]


def test_words_counts_forms_and_z_equal_the_dense_reference() -> None:
    for seed in range(4):
        spans = planted(np.random.default_rng(seed))
        whole, expected = tally_of(spans, 12), slow_words(spans, 12)
        for place in PLACES:
            words = over_represented(whole.places[place])
            found: Found = {feature: [] for feature in range(12)}
            for feature, form, count, z in zip(words.feature, words.form, words.count, words.z, strict=True):
                text = whole.vocabulary[form]
                found[int(feature)].append((pytest.approx(z, abs=1e-8), normal_form(text), int(count), text))
            assert found == expected[place]
        assert labels.proto_labels(whole) == slow_labels(spans, 12)


def test_hardly_any_noise_gets_a_label() -> None:
    spans = noise(np.random.default_rng(1), 300, 40, [f"w{i}" for i in range(3000)])
    labelled = [line for line in labels.proto_labels(tally_of(spans, 300)) if line is not None]
    assert len(labelled) < 300 * 0.05


def test_a_word_that_all_features_share_labels_none() -> None:
    same = [Span(feature=i % 5, context=i, peak=1, tokens=(" a", " the", " b")) for i in range(200)]
    assert labels.proto_labels(tally_of(same, 6)) == [None] * 6


def test_a_word_that_only_one_feature_has_is_its_label() -> None:
    spans = [Span(feature=i % 5, context=i, peak=0, tokens=(f"w{i}",)) for i in range(200)]
    spans += [Span(feature=5, context=i, peak=0, tokens=(" mine",)) for i in range(3)]
    assert labels.proto_labels(tally_of(spans, 6)) == [None] * 5 + ["mine"]


def test_a_word_counts_near_once_a_context_but_at_every_peak() -> None:
    spans = [Span(feature=0, context=7, peak=1, tokens=("near", f"p{i}", "near")) for i in range(10)]
    spans += [Span(feature=0, context=7, peak=0, tokens=("at",)) for _ in range(3)]
    counts = tally_of(spans, 1).places
    assert counts["near"].count.tolist() == []
    assert sorted(counts["peak"].count.tolist()) == [3]
    assert sorted(counts["after"].count.tolist()) == [3, 10]


def test_near_ends_a_stated_number_of_tokens_from_the_peak() -> None:
    row = tuple(f"w{i}" for i in range(30))
    spans = [Span(feature=0, context=i, peak=15, tokens=row) for i in range(MIN_COUNT)]
    whole = tally_of(spans, 1)
    near = {whole.words[word] for word in whole.places["near"].word}
    assert near == set(row[15 - NEAR[0] : 16 + NEAR[1]]) - {"w15"}


def test_words_of_equal_z_come_in_the_order_of_words() -> None:
    spans = [Span(feature=1, context=i, peak=0, tokens=(f"w{i}",)) for i in range(500)]
    spans += [Span(feature=0, context=i, peak=0, tokens=(word,)) for i in range(5) for word in (" b", " c", "a")]
    words = over_represented((whole := tally_of(spans, 2)).places["peak"])
    assert len(set(words.z.tolist())) == 1
    assert [whole.vocabulary[form] for form in words.form] == ["a", " b", " c"]


def test_a_word_is_shown_in_its_most_frequent_form_for_that_feature() -> None:
    spans = [Span(feature=2, context=i, peak=0, tokens=(f"w{i}",)) for i in range(500)]
    for feature, forms in ((0, [" If"] * 3 + ["IF"] * 4 + ["if"]), (1, ["if"] * 4 + [" if"] * 4)):
        spans += [Span(feature=feature, context=i, peak=0, tokens=(form,)) for i, form in enumerate(forms)]
    words = over_represented((whole := tally_of(spans, 3)).places["peak"])
    assert [whole.vocabulary[form] for form in words.form] == ["IF", " if"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_spans_and_the_numbers_of_contexts_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spans = planted(rng)
    other = rng.permutation(1000)
    moved = [
        Span(feature=s.feature, context=int(other[s.context]), peak=s.peak, tokens=s.tokens)
        for s in (spans[i] for i in rng.permutation(len(spans)))
    ]
    assert labels.proto_labels(tally_of(moved, 12)) == labels.proto_labels(tally_of(spans, 12))


@pytest.mark.parametrize("cuts", [[6], [1, 2, 11], list(range(1, 12))])
def test_ranges_of_features_counted_apart_give_the_same_labels(cuts: list[int]) -> None:
    spans = planted(np.random.default_rng(0))
    edges = [0, *cuts, 12]
    parts = [
        tally_of(
            [
                Span(feature=s.feature - start, context=s.context, peak=s.peak, tokens=s.tokens)
                for s in spans
                if start <= s.feature < stop
            ],
            stop - start,
        )
        for start, stop in pairwise(edges)
    ]
    assert labels.proto_labels(labels.joined(parts)) == labels.proto_labels(tally_of(spans, 12))


def test_logits_are_said_of_features_that_fire_only() -> None:
    spans = planted(np.random.default_rng(0))
    says = [["Yes", " yes", " no"]] * 12
    found = labels.proto_labels(tally_of(spans, 12), says)
    assert found[1:3] == [None, "except · says Yes, no"]


@pytest.mark.parametrize(
    ("token", "shown", "word"),
    [
        (" The", "The", "the"),
        ("Straße ", "Straße", "straße"),
        (" ", "␣", "␣"),
        ("  ", "␣␣", "␣␣"),
        ("        ", "␣␣␣", "␣␣␣"),
        ("\n", "↩", "↩"),
        ("\n\n\n\n\n", "↩↩↩", "↩↩↩"),
        ("\n            ", "↩␣␣␣", "↩␣␣␣"),
        ("\t\t", "⇥⇥", "⇥⇥"),
        ("\u3000", "␣", "␣"),
        ("):\n    X", "):↩␣␣␣X", "):↩␣␣␣x"),
        ("----------", "---", "---"),
        ("____", "___", "___"),
        ("0000", "0000", "0000"),
        ("zzzz", "zzzz", "zzzz"),
        ("�", "�", "�"),
        ("\x00\x1b", "\\x00\\x1b", "\\x00\\x1b"),
        ("\u200b\u202e", "\\u200b\\u202e", "\\u200b\\u202e"),
        ("日本", "日本", "日本"),
        ("🙂", "🙂", "🙂"),
        ("", "⟨empty⟩", "⟨empty⟩"),
    ],
)
def test_tokens_are_made_visible_and_merged(token: str, shown: str, word: str) -> None:
    assert visible(token) == shown
    assert normal_form(token) == word


@pytest.mark.parametrize(
    ("lists", "line"),
    [
        (([" except"], [], []), "except"),
        (([" except", "inally"], ["\n    ", "f"], [" try"]), "except, inally after ↩␣␣␣, f · near try"),
        (([], [], ["try"], [" pass", "Pass", " raise"]), "near try · says pass, raise"),
        (([], [], [], [" pass"]), "says pass"),
        (([], ["ull"], []), "after ull"),
        ((["x"], ["y"], ["X", " Y", "z"]), "x after y · near z"),
        (([" after"], ["near"], ["says"]), "‘after’ after ‘near’ · near ‘says’"),
        (([",", '("', "…", "a,b", "don't"], [], []), '‘,’, ‘("’, ‘…’, ‘a,b’'),
        ((["·", "�"], [], []), "‘·’, ‘�’"),
        ((["abcdefghijklmnopqrstuvwxyz"], [], []), "abcdefghijklmnopqrs…"),
        (([], [], []), None),
    ],
)
def test_a_line_reads_as_documented(lists: Any, line: str | None) -> None:
    assert proto_label(*lists) == line


def test_words_that_do_not_account_for_most_peaks_end_in_an_ellipsis() -> None:
    assert proto_label(["a"], ["b"], [], has_others=True) == "a, … after b"
    assert proto_label([], ["b"], [], has_others=True) == "after b"
    spans = [Span(feature=0, context=i, peak=0, tokens=(f"w{i}",)) for i in range(500)]
    for num_others, line in ((5, "mine"), (6, "mine, …")):
        mine = [" mine"] * 5 + [f"v{i}" for i in range(num_others)]
        whole = tally_of([*spans, *(Span(feature=1, context=i, peak=0, tokens=(t,)) for i, t in enumerate(mine))], 2)
        assert labels.proto_labels(whole) == [None, line]


def test_a_line_that_is_too_long_loses_the_ends_of_its_longest_lists() -> None:
    word = "abcdefghijklmnop"
    peak, near = [f"{word}{i}" for i in range(4)], [f"{word}{i}" for i in range(5, 9)]
    assert proto_label(peak, [], near) == f"{word}0, {word}1 · near {word}5, {word}6"


TOKENS = st.lists(st.text(max_size=40), max_size=6)


@given(TOKENS, TOKENS, TOKENS, TOKENS, st.booleans())
def test_every_line_is_short_printable_and_names_the_best_word_first(
    peak: list[str], after: list[str], near: list[str], says: list[str], has_others: bool
) -> None:
    line = proto_label(peak, after, near, says, has_others=has_others)
    assert (line is None) == (not (peak or after or near or says))
    if line is not None:
        assert len(line) <= MAX_CHARACTERS
        assert line.isprintable()
        if peak:
            assert line.removeprefix("‘").startswith(visible(peak[0])[:19])


# --- catalogs -----------------------------------------------------------------------------------------------


def column(catalog: Catalog, site: tuple[str, str]) -> dict[int, str | None]:
    rows = catalog.features.to_pylist()
    return {row["feature_id"]: row["proto_label"] for row in rows if (row["hook_point"], row["sae"]) == site}


def analyzed(config: AnalyzeConfig) -> Catalog:
    """The catalog, with a bound under which even the random SAEs of the tiny world have words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "MIN_Z", EASY_Z)
        return analyze(config, lambda line: None).catalog


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., Any]) -> tuple[AnalyzeConfig, Catalog]:
    config = analyze_config(tmp_path_factory.mktemp("labels"))
    return config, analyzed(config)


@pytest.mark.parametrize("site", SITES, ids=["early", "late"])
def test_the_labels_of_a_catalog_are_those_of_its_spans(
    made: tuple[AnalyzeConfig, Catalog], site: tuple[str, str]
) -> None:
    catalog, found = made[1], column(made[1], site)
    decode = AutoTokenizer.from_pretrained(made[0].model.id).decode
    spans, seen = [], set()
    for feature in found:
        for row in catalog.spans(*site, feature).to_pylist():
            context = (row["shard_id"], row["context_id"])
            address = (feature, context, row["position"])
            if row["group"] not in ("low_activating", "non_activating") and address not in seen:
                seen.add(address)
                peak = row["position"] - row["start"]
                spans.append(
                    Span(
                        feature=feature,
                        context=hash(context),
                        peak=peak,
                        tokens=tuple(decode([i]) for i in row["token_ids"]),
                    )
                )
    assert list(found.values()) == slow_labels(spans, len(found), EASY_Z)
    dead = [row["feature_id"] for row in catalog.features.to_pylist() if row["dead"] and row["sae"] == site[1]]
    assert dead
    assert all(found[feature] is None for feature in dead)
    assert sum(line is not None for line in found.values()) > len(found) / 2


def test_a_reduce_that_is_done_again_gives_the_same_labels(
    made: tuple[AnalyzeConfig, Catalog], tmp_path: Path, analyze_config: Callable[..., Any]
) -> None:
    config, catalog = made
    shutil.copytree(config.store.root, tmp_path / "again", ignore=lambda folder, names: {"catalogs"} & set(names))
    again = analyzed(analyze_config(tmp_path / "again"))
    assert again.digest == catalog.digest
    assert all(column(again, site) == column(catalog, site) for site in SITES)
