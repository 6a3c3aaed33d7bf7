"""Tokenizers of GGUF files: the same ids as the tokenizer that the file was made of, or a refusal by name."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from made_tokenizers import LINES, byte_level, metaspace_bpe, save, sentencepiece, tiktoken_like
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from sae_census.errors import CheckpointError
from sae_census.io.loading.gguf_rules import PRE_RULES
from sae_census.io.loading.pretrained import resolve
from sae_census.io.loading.pretrained import tokenizer_of_gguf as read
from sae_census.io.tokens.tokenizer import Tokenizer

TEXTS = [
    *LINES,
    "x  12\n    3.5   77",
    "river  bridge\n\n  the   Bridge's CAMELCase  2024!!",
    "  a<s>b 日本 🚀 ж\r\n",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write(path: Path, inner: Backend, kind: str, pre: str | None, types: dict[str, int], **more: Any) -> Path:
    """A GGUF file of a tokenizer alone; `more` are further keys of `tokenizer.ggml`."""
    rules = json.loads(inner.to_str())
    tokens = [token for token, _ in sorted(inner.get_vocab().items(), key=lambda item: item[1])]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, BYTE if token.startswith("<0x") else NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    for name, value in more.items():
        add: Callable[..., None] = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def ids(inner: Any, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    return [one.ids for one in inner.encode_batch(list(texts), add_special_tokens=False)]


def with_digits(inner: Backend) -> Backend:
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), inner.pre_tokenizer])
    return inner


def ignoring_merges(inner: Backend) -> Backend:
    """Some words are in the vocabulary alone: no merge makes them."""
    rules = json.loads(inner.to_str())
    rules["model"] |= {"ignore_merges": True, "merges": rules["model"]["merges"][:-40]}
    return Backend.from_str(json.dumps(rules))


CONTROLS = {"<s>": CONTROL, "</s>": CONTROL}
ORIGINALS: dict[str, Callable[[], Backend]] = {
    "gpt-2": byte_level,
    "olmo": byte_level,
    "smollm": lambda: with_digits(byte_level()),
    "starcoder": lambda: with_digits(byte_level()),
    "dbrx": tiktoken_like,
    "llama-bpe": lambda: ignoring_merges(tiktoken_like()),
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_a_byte_level_file_gives_the_ids_of_its_original(tmp_path: Path, pre: str) -> None:
    original = ORIGINALS[pre]()
    found = read(write(tmp_path / "t.gguf", original, "gpt2", pre, CONTROLS))
    assert ids(found.backend_tokenizer) == ids(original)
    others = [ORIGINALS[name]() for name in ("gpt-2", "smollm", "dbrx")]
    assert sum(ids(other) != ids(original) for other in others) >= 2  # the texts tell the rules apart


@pytest.mark.parametrize("pre", sorted(PRE_RULES))
def test_every_known_rule_cuts_text_into_pieces_of_it(tmp_path: Path, pre: str) -> None:
    inner = byte_level()
    found = read(write(tmp_path / "t.gguf", inner, "gpt2", pre, CONTROLS)).backend_tokenizer
    assert [found.decode(row, skip_special_tokens=False) for row in ids(found)] == TEXTS


@pytest.mark.parametrize("pre", ["kimi-k2", "afmoe", "of-next-year", None])
def test_a_way_of_splitting_that_is_not_known_is_refused_by_name(tmp_path: Path, pre: str | None) -> None:
    path = write(tmp_path / "t.gguf", byte_level(), "gpt2", pre, CONTROLS)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.ggml\.pre={pre!r}.*not known here"):
        read(path)


def test_a_kind_of_tokenizer_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of the kind 'rwkv'; expected gpt2"):
        read(write(tmp_path / "t.gguf", byte_level(), "rwkv", None, CONTROLS))


@pytest.mark.parametrize(
    ("prefix", "original"),
    [({}, True), ({"add_space_prefix": True}, True), ({"add_space_prefix": False}, False)],
)
def test_a_sentencepiece_file_gives_the_ids_of_its_original(
    tmp_path: Path, prefix: dict[str, bool], original: bool
) -> None:
    inner = sentencepiece(strip=original, prepend=original)
    types = {"<unk>": UNKNOWN, **CONTROLS}
    found = read(write(tmp_path / "t.gguf", inner, "llama", "default", types, **prefix)).backend_tokenizer
    assert ids(found) == ids(inner)
    assert [found.decode(row, skip_special_tokens=False) for row in ids(found)[:4]] == TEXTS[:4]
    assert ids(found) != ids(metaspace_bpe() if original else sentencepiece(strip=True, prepend=True))


@pytest.mark.parametrize(
    ("kind", "pre", "said", "adds"),
    [
        ("gpt2", "gpt-2", {}, False),
        ("gpt2", "llama-bpe", {}, True),
        ("gpt2", "llama-bpe", {"add_bos_token": False}, False),
        ("gpt2", "smollm", {"add_bos_token": True}, True),
        ("llama", None, {}, True),
        ("llama", None, {"add_bos_token": False}, False),
    ],
)
def test_whether_a_bos_is_put_first_is_what_the_file_says(
    tmp_path: Path, kind: str, pre: str | None, said: dict[str, bool], adds: bool
) -> None:
    inner = byte_level() if kind == "gpt2" else sentencepiece(strip=True, prepend=True)
    roles = {"bos_token_id": inner.token_to_id("<s>"), "eos_token_id": inner.token_to_id("</s>")}
    path = write(tmp_path / "t.gguf", inner, kind, pre, CONTROLS, **roles, **said)
    tokenizer = Tokenizer(str(save(read(path), tmp_path / "saved")))
    assert tokenizer.adds_bos is adds
    assert tokenizer.bos_id == roles["bos_token_id"]
    assert set(roles.values()) <= set(tokenizer.special_ids)


def test_tokens_that_a_file_added_keep_their_ids(tmp_path: Path) -> None:
    inner = byte_level(special=("<s>", "<｜begin▁of▁text｜>", "<think> now", "</s>"))
    types = {"<s>": CONTROL, "</s>": CONTROL, "<｜begin▁of▁text｜>": CONTROL, "<think> now": USER_DEFINED}
    path = write(tmp_path / "t.gguf", inner, "gpt2", "gpt-2", types, bos_token_id=1, eos_token_id=3)
    tokenizer = Tokenizer(str(save(read(path), tmp_path / "saved")))
    assert tokenizer.size == inner.get_vocab_size()
    assert tokenizer.encode(["<｜begin▁of▁text｜>", "<think> now"]) == [[1], [2]]
    assert tokenizer.special_ids == (0, 1, 3)


def test_a_conversion_under_other_rules_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path))
    path = write(tmp_path / "t.gguf", byte_level(), "gpt2", "of-next-year", CONTROLS)
    name = hashlib.sha256(b"t.gguf" + hashlib.sha256(path.read_bytes()).digest()).hexdigest()[:16]
    (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / name / "config.json").write_text("{}")  # as converted before
    with pytest.raises(CheckpointError, match="of-next-year"):
        resolve(str(path), None)
