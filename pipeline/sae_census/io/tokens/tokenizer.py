"""Text to token ids and back: the tokenizers of transformers, with what the pipeline must know of them."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

from sae_census.errors import CheckpointError, ConfigError
from sae_census.io.loading import library_warnings
from sae_census.io.loading.pretrained import digest, first_line, resolve
from sae_census.io.tokens.token_texts import TokenTexts
from sae_census.io.tokens.tokenizer_rules import rules_digest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


class Tokenizer:
    """Text to token ids and back, with the few facts about special tokens that the pipeline needs.

    Special are the tokens that have a role (BOS, EOS, unknown, …) or were added as special ones. A token whose only
    role is to pad is special unless texts contain it: one that the vocabulary gives for its own text, such as `,`, is
    an ordinary token there. Padding itself is known by its place alone.
    """

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        trust_remote_code: bool = False,
        fix_mistral_regex: bool | None = None,
    ):
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._model_id = model_id
        self._source = resolve(model_id, revision)
        chosen = {} if fix_mistral_regex is None else {"fix_mistral_regex": fix_mistral_regex}
        try:
            with library_warnings.captured():
                self._inner = AutoTokenizer.from_pretrained(
                    self._source, revision=revision, trust_remote_code=trust_remote_code, **chosen
                )
        except Exception as error:
            raise CheckpointError(f"no tokenizer could be loaded from {model_id}: {first_line(error)}") from error
        self._inner.model_max_length = int(1e30)  # we cut contexts ourselves; no warning about length
        added = self._inner.added_tokens_decoder
        self.named_special_ids = tuple(
            sorted(set(self._inner.all_special_ids) | {i for i, t in added.items() if t.special})
        )
        """All with a role, the pad token among them."""
        self.special_ids: tuple[int, ...] = self.named_special_ids
        if (pad := self._inner.pad_token_id) is not None and self._is_ordinary(pad):
            self.special_ids = tuple(i for i in self.named_special_ids if i != pad)
        self.bos_id: int | None = self._inner.bos_token_id
        self.pad_id: int = pad if pad is not None else (self._inner.eos_token_id or 0)
        """What fills rows: the pad token, else EOS, else 0. No place is told by it."""
        self.size = len(self._inner)
        self.adds_bos = self.bos_id is not None and self._inner("a")["input_ids"][:1] == [self.bos_id]
        self.encodes_bos = self.bos_id is not None and self.encode(["a"])[0][:1] == [self.bos_id]
        """Whether `encode` itself begins every text with a BOS."""

    def _is_ordinary(self, pad: int) -> bool:
        """Whether a token has no other role than to pad, and its text gives it though nothing added is looked for."""
        inner = self._inner
        roles = {value for name, value in inner.special_tokens_map.items() if name != "pad_token"}
        text = inner.convert_ids_to_tokens(pad)
        if text in {str(role) for role in roles} or text in map(str, getattr(inner, "extra_special_tokens", ())):
            return False
        if pad not in inner(inner.decode([pad]), add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            return False
        backend = getattr(inner, "backend_tokenizer", None)
        if backend is not None and type(backend.model).__name__ == "Unigram":
            # A Unigram vocabulary spells its control tokens, too; they have the score 0, which no piece of text has.
            return bool(dict(json.loads(backend.to_str())["model"]["vocab"])[text] < 0)
        return True

    @cached_property
    def digest(self) -> str:
        """sha256 of what decides ids, wherever it was read from: rules, special ids, and whether a BOS is put first."""
        special = {"ids": self.special_ids, "bos": self.bos_id, "adds_bos": self.adds_bos}
        return rules_digest(self._inner, special)

    @cached_property
    def file_digest(self) -> str:
        """The former `digest`, of file bytes or id and commit: stores made before were named with it."""
        commit = self._inner.init_kwargs.get("_commit_hash")
        rules = json.dumps([self.named_special_ids, self.bos_id, self.pad_id, self.adds_bos])
        return hashlib.sha256((digest(self._source, TOKENIZER_FILES, commit) + rules).encode()).hexdigest()

    def digest_as(self, known: str | None) -> str:
        """`digest`, or `file_digest` if that is `known`: the one by which a store already knows this tokenizer."""
        return self.file_digest if known is not None and known == self.file_digest else self.digest

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without added special tokens."""
        encoded: list[list[int]] = self._inner(texts, add_special_tokens=False)["input_ids"]
        return encoded

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, without added special tokens, and the characters that each stands for.

        The characters cover the text without a gap: space that no token names belongs to the one after it, and a
        character of several tokens to the last of them.

        Raises:
            ConfigError: if the tokenizer does not tell where its tokens stand, and they do not spell the text.
        """
        if getattr(self._inner, "backend_tokenizer", None) is None:
            ids = self.encode([text])[0]
            return ids, self._spelled(ids, text)
        encoded = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        covered = [0, *accumulate((int(end) for _, end in offsets), max)]
        starts = [min(int(start), end) for (start, _), end in zip(offsets, covered[:-1], strict=True)]
        starts = list(accumulate([*starts, len(text)], max))
        if ids:
            starts[0] = 0
        return ids, list(pairwise(starts))

    def _spelled(self, ids: list[int], text: str) -> list[tuple[int, int]]:
        """The characters of each token, by the text of each."""
        words = self.token_texts([ids])[0]
        if words and "".join(words) == f" {text}":  # what a tokenizer puts before every text
            words[0] = words[0].removeprefix(" ")
        if "".join(words) != text:
            raise ConfigError(
                f"the tokenizer of {self._model_id} is written in Python: it does not say which characters a token "
                "stands for, and its tokens do not spell the text; use a model with a fast tokenizer (tokenizer.json)"
            )
        ends = list(accumulate(map(len, words)))
        return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids of a text, behind a BOS if the tokenizer adds one by itself and the text brought none."""
        return ids if not self.adds_bos or self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def as_chat(self, prompt: str) -> str:
        """The prompt as a user's turn, up to where the model would answer.

        Raises:
            ConfigError: if the tokenizer has no chat template.
        """
        if not self._inner.chat_template:
            raise ConfigError("this model's tokenizer has no chat template; use chat_template=false")
        turns = [{"role": "user", "content": prompt}]
        text: str = self._inner.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a run of tokens by itself (no clean-up of spaces); decoders may strip the space before it."""
        text: str = self._inner.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many runs."""
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is None:
            return [self.decode(row) for row in rows]
        texts: list[str] = backend.decode_batch(rows, skip_special_tokens=False)
        return texts

    def token_texts(self, rows: Sequence[Sequence[int]]) -> list[list[str]]:
        """The text of every token of each run; joined, they are the text of the run, as it stands inside a text.

        A space before its first token stays. A character of several tokens stands at the one that completes it, and
        the others are empty; bytes that are no character show as �.
        """
        return self._token_texts.of(rows)

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The text of every token by itself, as inside a text; bytes of a split character show as �."""
        return self._token_texts.alone(ids)

    @cached_property
    def _token_texts(self) -> TokenTexts:
        return TokenTexts(self.decode_many, self._anchor())

    def _anchor(self) -> int | None:
        """A token that may stand before any: the last of a plain word."""
        for word in ("a", "the", "0"):
            last = self.encode([word])[0][-1:]
            alone, twice = self.decode_many([last, last * 2])
            if alone.strip() and twice != alone and twice.startswith(alone):
                return last[0]
        return None
