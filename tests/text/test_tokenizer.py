"""Tokenizers of every kind: texts of tokens that join, identity by what decides ids, pads, and one BOS."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import KINDS, adding_bos, by_bytes, byte_level, save, sentencepiece, unigram
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_census.config import DiscoverRequest
from sae_census.errors import ConfigError, RequestError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.identity import find_config_sources, identify
from sae_census.flows.notebook.observe import observe_prompts
from sae_census.io.checkpoints import load_sae
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.census.prepare import Preparer, PrepareSettings
from sae_census.steps.discovery.sequences import continued, sequence_of

Made = Callable[[str], Tokenizer]
law = settings(max_examples=30, deadline=None, database=None, derandomize=True)
words = st.sampled_from(
    ["river", "bridge", " ", "  ", "\n", "\n\n", "\t", "don't", "x=[1]", "é", "Zürich", "naïve", "日本", "漢",
     "🙂", "👩‍👩‍👧",
     "e\u0301", "\u200b", "\u00a0", "ﬁ", "�", "ж", ".", ",", "!", " a", "A", "12", "<s>", "\\", "▁", "##", "</w>"]
)  # fmt: skip
texts = st.lists(st.one_of(words, st.characters(exclude_categories=["Cs"])), max_size=12).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tokenizer of each kind, made when first asked for."""
    known: dict[str, Tokenizer] = {}

    def get(kind: str) -> Tokenizer:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = Tokenizer(str(save(by_bytes() if kind == "by_bytes" else KINDS[kind](), folder)))
        return known[kind]

    return get


every_kind = pytest.mark.parametrize("kind", [*KINDS, "by_bytes"])


@every_kind
@law
@given(text=texts, data=st.data())
def test_tokens_join_to_the_text_of_their_run(made: Made, kind: str, text: str, data: st.DataObject) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode([text])[0]
    start = data.draw(st.integers(0, len(ids)))
    run = ids[start : data.draw(st.integers(start, len(ids)))]
    anchor = tokenizer.encode(["a"])[0][-1]
    before, whole = tokenizer.decode_many([[anchor], [anchor, *run]])
    found = tokenizer.token_texts([run, ids])
    assert len(found[0]) == len(run)
    assert before + "".join(found[0]) == whole
    assert before + "".join(found[1]) == tokenizer.decode_many([[anchor, *ids]])[0]


@every_kind
def test_words_keep_the_space_before_them(made: Made, kind: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(["the river flows under the bridge"])[0]
    assert "".join(tokenizer.token_texts([ids])[0]).split() == ["the", "river", "flows", "under", "the", "bridge"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "by_bytes"])
def test_a_character_of_several_tokens_stands_at_the_last_of_them(made: Made, kind: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(["ж"])[0]
    found = tokenizer.token_texts([ids])[0]
    assert len(ids) > 1
    assert [text.strip() for text in found] == [""] * (len(ids) - 1) + ["ж"]


@every_kind
def test_long_runs_join_too(made: Made, kind: str) -> None:
    tokenizer = made(kind)
    words = "the river zh 日本 bridge " if kind == "word_piece" else "the river ж 日本 bridge "
    ids = tokenizer.encode([words * 60])[0]
    assert len(ids) > 256
    found = tokenizer.token_texts([ids])[0]
    assert len(found) == len(ids)
    assert "".join(found).strip() == tokenizer.decode(ids).strip()


@every_kind
@law
@given(text=texts)
def test_the_characters_of_tokens_cover_the_text_in_order(made: Made, kind: str, text: str) -> None:
    tokenizer = made(kind)
    ids, chars = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode([text])[0]
    assert len(chars) == len(ids)
    if ids:
        assert "".join(text[start:stop] for start, stop in chars) == text


def test_a_python_tokenizer_that_does_not_spell_its_text_is_refused_in_a_line(made: Made) -> None:
    tokenizer = made("by_bytes")
    assert tokenizer.encode_with_offsets("aé")[1] == [(0, 1), (1, 1), (1, 2)]
    with pytest.raises(ConfigError, match=r"written in Python.*use a model with a fast tokenizer"):
        tokenizer.encode_with_offsets("a</s> b")  # it takes the space after </s> away


@every_kind
def test_a_continuation_joins_the_text_that_it_continues(made: Made, kind: str) -> None:
    tokenizer = made(kind)
    sequence = sequence_of(DiscoverRequest(prompt="the river", generate=True), tokenizer, 200)
    generated = tokenizer.encode([" bridge ж flows"])[0]
    whole = continued(sequence, generated, tokenizer)
    assert whole.text.startswith("the river")
    assert "".join(whole.text[start:stop] for start, stop in whole.chars) == whole.text
    assert len(whole.chars) == len(whole.ids) == len(sequence.ids) + len(generated)
    assert "flows" in whole.text


def test_a_request_in_a_tokenizer_without_characters_is_answered_or_refused_in_a_line(made: Made) -> None:
    tokenizer = made("by_bytes")
    assert sequence_of(DiscoverRequest(text="aé"), tokenizer, 9).chars == [(0, 1), (1, 1), (1, 2)]
    with pytest.raises(RequestError, match="written in Python"):
        sequence_of(DiscoverRequest(text="a</s> b"), tokenizer, 9)


def rules(inner: Backend) -> dict[str, object]:
    return dict(json.loads(inner.to_str()))


def test_equal_rules_from_other_files_are_one_tokenizer(tmp_path: Path) -> None:
    first = Tokenizer(str(save(adding_bos(byte_level()), tmp_path / "a")))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    turned = dict(reversed(json.loads((tmp_path / "a" / "tokenizer.json").read_text()).items()))
    turned["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    turned["model"]["vocab"] = dict(reversed(turned["model"]["vocab"].items()))
    turned["model"]["merges"] = [" ".join(pair) for pair in turned["model"]["merges"]]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(turned))
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    again = Tokenizer(str(tmp_path / "b"))
    assert again.digest == first.digest
    assert again.file_digest != first.file_digest


def test_any_rule_that_changes_an_id_changes_the_digest(tmp_path: Path) -> None:
    def without_a_merge(inner: Backend) -> Backend:
        changed = rules(inner)
        changed["model"]["merges"].pop()  # type: ignore[index]  # JSON
        return Backend.from_str(json.dumps(changed))

    def with_digits_apart(inner: Backend) -> Backend:
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), inner.pre_tokenizer])
        return inner

    def with_a_word(inner: Backend) -> Backend:
        inner.add_tokens(["river"])
        return inner

    def with_a_special_word(inner: Backend) -> Backend:
        inner.add_special_tokens(["river"])
        return inner

    def with_a_greedy_word(inner: Backend) -> Backend:
        inner.add_tokens([AddedToken("river", lstrip=True)])
        return inner

    changes = [
        lambda inner: inner,
        adding_bos,
        without_a_merge,
        with_digits_apart,
        with_a_word,
        with_a_special_word,
        with_a_greedy_word,
    ]
    digests = {Tokenizer(str(save(change(byte_level()), tmp_path / str(i)))).digest for i, change in enumerate(changes)}
    assert len(digests) == len(changes)


def test_a_python_tokenizer_is_its_code_and_its_vocabulary(tmp_path: Path) -> None:
    first, again = (Tokenizer(str(save(by_bytes(), tmp_path / name))) for name in "ab")
    other = by_bytes()
    other.add_tokens(["river"])
    assert first.digest == again.digest != Tokenizer(str(save(other, tmp_path / "c"))).digest


def test_a_pad_that_texts_contain_is_no_special_token(tmp_path: Path) -> None:
    comma = Tokenizer(str(save(byte_level(), tmp_path / "comma", pad_token=",")))
    assert comma.encode([","])[0] == [comma.pad_id]
    assert comma.pad_id not in comma.special_ids
    assert comma.bos_id in comma.special_ids


@pytest.mark.parametrize("pad", ["</s>", "<pad>", "<unk>"])
def test_a_pad_that_has_another_role_or_was_added_is_special(tmp_path: Path, pad: str) -> None:
    inner = byte_level(special=("<s>", "</s>", "<unk>", "<pad>"))
    tokenizer = Tokenizer(str(save(inner, tmp_path, pad_token=pad)))
    assert tokenizer.pad_id == inner.token_to_id(pad)
    assert tokenizer.pad_id in tokenizer.special_ids


def test_a_pad_in_a_unigram_vocabulary_is_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(save(unigram(), tmp_path, pad_token="<pad>")))
    assert tokenizer.pad_id in tokenizer.special_ids


def test_without_a_pad_rows_are_filled_with_eos_and_nothing_more_is_special(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(save(sentencepiece(strip=True, prepend=True), tmp_path)))
    assert tokenizer.pad_id == 2
    assert tokenizer.special_ids[:3] == (0, 1, 2)


def test_text_that_brings_its_own_bos_gets_no_second(tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(save(adding_bos(byte_level()), tmp_path)))
    bos = tokenizer.bos_id
    plain, brought = (tokenizer.with_bos(ids) for ids in tokenizer.encode(["river", "<s>river<s>x"]))
    assert plain[0] == brought[0] == bos
    assert [ids.count(bos) for ids in (plain, brought)] == [1, 2]
    assert tokenizer.adds_bos
    assert not tokenizer.encodes_bos


def write_lines(folder: Path, texts: list[str]) -> dict[str, str]:
    folder.mkdir()
    (folder / "chat.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"chat": str(folder / "chat.jsonl")}


def test_a_corpus_with_its_own_bos_gives_the_shards_of_one_without(tmp_path: Path, analyze_config: MakeConfig) -> None:
    texts = ["river water stone", "the list of names " * 9, "mother bread", "number sum"]
    records = {}
    for name, source in (
        ("plain", write_lines(tmp_path / "plain", texts)),
        ("chat", write_lines(tmp_path / "chat", [f"<s>{text}" if i != 2 else text for i, text in enumerate(texts)])),
    ):
        config = analyze_config(tmp_path / "store", corpus={"source": source, "context_length": 8})
        identity = identify(config)
        for rule in (2, 1):
            settings = PrepareSettings(
                root=config.store.root,
                model=config.model,
                corpus=config.corpus,
                preparation=identity.identity.preparation.model_copy(update={"format": rule}),
                num_embeddings=identity.facts.num_embeddings,
                planned=identity.provenance,
            )
            records[name, rule] = Preparer(settings).run(find_config_sources(config).sources[0])
    ids = {key: [shard.shard_id for shard in record.shards] for key, record in records.items()}
    assert ids["plain", 2] == ids["chat", 2] == ids["plain", 1] != ids["chat", 1]
    assert [records[name, 2].num_with_bos for name in ("plain", "chat")] == [0, 3]


def test_a_run_says_how_many_documents_brought_a_bos(tmp_path: Path, analyze_config: MakeConfig) -> None:
    source = write_lines(tmp_path / "chat", ["<s>river water stone", "<s>mother bread <s>", "number sum total"] * 3)
    said: list[str] = []
    found = analyze(analyze_config(tmp_path / "store", corpus={"source": source}), said.append)
    assert any("6 of 9 documents begin with a BOS of their own" in line for line in said)
    assert found.catalog.manifest.coverage.documents_with_bos == 6


def test_a_prompt_that_brings_its_bos_is_observed_as_one_without(model_dir: Path, sae_dirs: dict[str, Path]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    sae = load_sae(str(sae_dirs["late"]))
    plain, brought = (observe_prompts(model, tokenizer, sae, [text], 1) for text in ("river water", "<s>river water"))
    assert plain.dense().equal(brought.dense())


def test_a_run_counts_the_pad_token_that_its_texts_contain(
    tmp_path: Path, model_dir: Path, analyze_config: MakeConfig
) -> None:
    folder = shutil.copytree(model_dir, tmp_path / "model")
    AutoTokenizer.from_pretrained(model_dir, pad_token=",").save_pretrained(folder)
    source = write_lines(tmp_path / "chat", ["river, water, stone,", "mother, bread,, <pad>"])
    config = analyze_config(
        tmp_path / "store", model={"id": str(folder)}, corpus={"source": source, "packing": "document"}
    )
    coverage = analyze(config, lambda line: None).catalog.manifest.coverage
    for books in coverage.tokens.values():
        assert books["special_tokens"] == 3  # a BOS each, and what was added as <pad>
        assert books["counted"] + books["special_tokens"] == coverage.slices["chat"].tokens
