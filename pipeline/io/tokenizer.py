"""Text to token ids and back: the tokenizers of transformers, with what the pipeline must know of them."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

from pipeline.errors import CheckpointError, ConfigError
from pipeline.io.pretrained import digest, first_line, resolve

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


class Tokenizer:
    """Text to token ids and back, with the few facts about special tokens that the pipeline needs."""

    def __init__(self, model_id: str, revision: str | None = None, *, trust_remote_code: bool = False):
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        source = resolve(model_id, revision)
        try:
            self._inner = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise CheckpointError(f"no tokenizer could be loaded from {model_id}: {first_line(error)}") from error
        self._inner.model_max_length = int(1e30)  # we cut contexts ourselves; no warning about length
        added = self._inner.added_tokens_decoder
        special = set(self._inner.all_special_ids) | {i for i, t in added.items() if t.special}
        self.special_ids: tuple[int, ...] = tuple(sorted(special))
        self.bos_id: int | None = self._inner.bos_token_id
        pad = self._inner.pad_token_id
        self.pad_id: int = pad if pad is not None else (self._inner.eos_token_id or 0)
        self.size = len(self._inner)
        self._texts: dict[int, str] = {}
        probe = self._inner("a")["input_ids"]
        self.adds_bos = self.bos_id is not None and probe[:1] == [self.bos_id]
        commit = self._inner.init_kwargs.get("_commit_hash")
        rules = json.dumps([self.special_ids, self.bos_id, self.pad_id, self.adds_bos])
        self.digest = hashlib.sha256((digest(source, TOKENIZER_FILES, commit) + rules).encode()).hexdigest()
        self.file_digest = self.digest
        """Of its files and special tokens; names it in stores of preparation format 1 and measure format 3."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without added special tokens."""
        encoded: list[list[int]] = self._inner(texts, add_special_tokens=False)["input_ids"]
        return encoded

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, without added special tokens, and the characters that each stands for."""
        encoded = self._inner(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], [(int(a), int(b)) for a, b in encoded["offset_mapping"]]

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
        """The text of a run of tokens, exactly as it stood (no clean-up of spaces)."""
        text: str = self._inner.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of many runs."""
        backend = getattr(self._inner, "backend_tokenizer", None)
        if backend is None:
            return [self.decode(row) for row in rows]
        texts: list[str] = backend.decode_batch(rows, skip_special_tokens=False)
        return texts

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The readable text of every token by itself; bytes of a split character show as �."""
        found = []
        for i in ids:
            if i not in self._texts:
                self._texts[i] = self._inner.decode([i], clean_up_tokenization_spaces=False)
            found.append(self._texts[i])
        return found
