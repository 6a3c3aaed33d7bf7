"""Which words stand where a feature fires much more often than where others do.

Three places of a span are looked at: its peak, the token right before that, and the tokens near it. At each, a
feature's words are compared with those of all features by the log-odds ratio with an informative Dirichlet prior
(Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16 and 20 to 22). Everything here is integers: a token
is an index into a vocabulary, and several tokens may be one word.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float64, Int64

Place = Literal["peak", "after", "near"]
PLACES: tuple[Place, ...] = get_args(Place)

NEAR = (12, 4)
"""Near are this many tokens before the peak and after it: farther off, topics speak louder than features."""
PRIOR = 5
"""How many times a feature's own words the prior weighs: doubling what is common anyway is no news."""
MIN_COUNT = 3
"""Thousands of words are tried for every feature, and some come twice by chance."""
MIN_Z = 3.0
"""For the same reason: at 2, most features of which there is nothing to say would get words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanTokens:
    """Spans of F features as tokens, in any order; a feature has no address twice."""

    feature: Int64[np.ndarray, " S"]
    context: Int64[np.ndarray, " S"]
    """A number of the context that each span was cut from."""
    peak: Int64[np.ndarray, " S"]
    """Which token of the span is its peak; 0 only if its document has nothing before it."""
    start: Int64[np.ndarray, " S+1"]
    """Where each span begins in `token`."""
    token: Int64[np.ndarray, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordCounts:
    """How often words stand at a place."""

    pool: Int64[np.ndarray, " W"]
    """Occurrences of each word, all features together."""
    total: Int64[np.ndarray, " F"]
    """Occurrences of all words, for each feature."""
    feature: Int64[np.ndarray, " P"]
    """The pairs of feature and word that occur at least `MIN_COUNT` times, ascending."""
    word: Int64[np.ndarray, " P"]
    count: Int64[np.ndarray, " P"]
    form: Int64[np.ndarray, " P"]
    """The token that the feature's word is most often; the lowest among equals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The words found: by feature, then z descending, then word."""

    feature: Int64[np.ndarray, " Q"]
    count: Int64[np.ndarray, " Q"]
    form: Int64[np.ndarray, " Q"]
    z: Float64[np.ndarray, " Q"]


def count_words(spans: SpanTokens, word_of: Int64[np.ndarray, " V"], num_features: int) -> dict[Place, WordCounts]:
    """Count the words at each place.

    At the peak and before it every span counts. Near it a word counts once for a feature and context, so that
    overlapping spans and lists of one word do not make it frequent.

    Args:
        spans: of features below `num_features`.
        word_of: the word of every token; the last token stands for the start of a document, before its first token.
        num_features: F.
    """
    num_words, num_tokens = int(word_of.max()) + 1, len(word_of)
    at = spans.start[:-1] + spans.peak
    peak, previous = spans.token[at], np.where(spans.peak > 0, spans.token[at - 1], num_tokens - 1)
    owner = np.repeat(np.arange(len(at)), np.diff(spans.start))
    distance = np.arange(len(owner)) - at[owner]
    near = (distance >= -NEAR[0]) & (distance <= NEAR[1]) & (distance != 0)
    num_contexts = int(spans.context.max(initial=0)) + 1
    place = (spans.feature * num_contexts + spans.context)[owner[near]]
    place, token = np.divmod(_distinct(place * num_tokens + spans.token[near]), num_tokens)
    once, word = np.divmod(_distinct(place * num_words + word_of[token]), num_words)

    def counts(
        feature: Int64[np.ndarray, " N"],
        word: Int64[np.ndarray, " N"],
        form_feature: Int64[np.ndarray, " M"],
        form: Int64[np.ndarray, " M"],
    ) -> WordCounts:
        pair, count = np.unique(feature * num_words + word, return_counts=True)
        pair, count = pair[count >= MIN_COUNT], count[count >= MIN_COUNT]
        return WordCounts(
            pool=np.bincount(word, minlength=num_words),
            total=np.bincount(feature, minlength=num_features),
            feature=pair // num_words,
            word=pair % num_words,
            count=count,
            form=_most_frequent(pair, form_feature * num_words + word_of[form], form),
        )

    return {
        "peak": counts(spans.feature, word_of[peak], spans.feature, peak),
        "after": counts(spans.feature, word_of[previous], spans.feature, previous),
        "near": counts(once // num_contexts, word, place // num_contexts, token),
    }


def _distinct(values: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " M"]:
    """Ascending. Asked for counts, NumPy sorts; for values alone it fills a hash table, fifty times slower."""
    return np.unique(values, return_counts=True)[0]


def _most_frequent(
    pairs: Int64[np.ndarray, " P"], pair: Int64[np.ndarray, " M"], token: Int64[np.ndarray, " M"]
) -> Int64[np.ndarray, " P"]:
    """For each of `pairs`, which ascend, the token that comes with it most often; the lowest among equals."""
    which = np.searchsorted(pairs, pair)
    mine = np.append(pairs, -1)[which] == pair
    num_tokens = int(token.max(initial=0)) + 1
    both, count = np.unique(which[mine] * num_tokens + token[mine], return_counts=True)
    order = np.lexsort((both, -count, both // num_tokens))
    _, first = np.unique(both[order] // num_tokens, return_index=True)
    return both[order][first] % num_tokens


def over_represented(counts: WordCounts) -> Words:
    """The words that a feature has at a place at least `MIN_COUNT` times and with z above `MIN_Z`.

    z is the difference of log-odds between the feature and the pool, over its standard deviation; the prior is
    `PRIOR` times the feature's total, shared out as the pool is. The pool includes the feature's own words, else
    what no other feature has would be compared with nothing. A word that stands everywhere is never found.
    """
    chosen = np.flatnonzero(counts.pool[counts.word] < counts.pool.sum())
    own, pool = counts.count[chosen], counts.pool[counts.word[chosen]]
    own_all, pool_all = counts.total[counts.feature[chosen]], counts.pool.sum()
    prior_all = PRIOR * own_all
    prior = prior_all * (pool / pool_all)
    odds = (own + prior) / (own_all + prior_all - own - prior)
    pool_odds = (pool + prior) / (pool_all + prior_all - pool - prior)
    z = np.log(odds / pool_odds) / np.sqrt(1 / (own + prior) + 1 / (pool + prior))
    z = np.round(z, 9)  # words of equal counts tie, whatever the last bits of a vectorised logarithm
    chosen, z = chosen[z > MIN_Z], z[z > MIN_Z]
    order = np.lexsort((counts.word[chosen], -z, counts.feature[chosen]))
    chosen = chosen[order]
    return Words(feature=counts.feature[chosen], count=counts.count[chosen], form=counts.form[chosen], z=z[order])
