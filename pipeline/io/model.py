"""The door to transformers: models and tokenizers from the hub, a directory or a GGUF file.

A GGUF file is converted once into a directory of safetensors in the cache, so that every later load is a
memory map. No pickle is loaded and no remote code runs unless `trust_remote_code` says so.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from logging import ERROR, getLogger
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError, ConfigError
from pipeline.io import embedded
from pipeline.io.hooks import Captures, Tap, layout_of, streams_of
from pipeline.types import HookPoint, Stream

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


def _quiet() -> None:
    """Transformers draws bars and advice on stderr; ours is the only voice of a job."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)


def _sha256(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _convert_gguf(path: Path) -> Path:
    """The cached safetensors directory of a GGUF file; made at the first call, named by the file's digest."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'")
    target = embedded.cache_dir() / "models" / _sha256([path])[:16]
    if (target / "config.json").exists():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        with contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        # The loader leaves the quantisation's description in the config, and then refuses to save itself.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.replace(target)
    except Exception as error:  # parsers, disks and the rename each have errors of their own
        if not target.exists():  # another process may have finished the same conversion first
            raise CheckpointError(f"{path} could not be converted from GGUF: {_first_line(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def resolve(model_id: str, revision: str | None) -> Path | str:
    """What `from_pretrained` should load: a local directory, or the hub id itself.

    Raises:
        CheckpointError: if a local path does not hold a model.
    """
    _quiet()
    if model_id.startswith(embedded.PREFIX):
        return _convert_gguf(embedded.model_path())
    path = Path(model_id).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return _convert_gguf(path)
        raise CheckpointError(f"model.id {model_id} is a file; expected a GGUF file, a directory or a hub id")
    if not path.is_dir():
        if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
            raise CheckpointError(f"model.id {model_id} does not exist; expected a directory, a GGUF file or a hub id")
        return model_id
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model directory {model_id} has no config.json; is it a saved model?")
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise CheckpointError(
            f"model directory {model_id} has no weights; expected model.safetensors (or pytorch_model.bin) "
            "beside config.json"
        )
    return path


def _digest(source: Path | str, patterns: Sequence[str], commit: str | None) -> str:
    """Identity by content for a directory, by commit for a hub id."""
    if isinstance(source, Path):
        return _sha256(sorted({p for pattern in patterns for p in source.glob(pattern)}))
    return hashlib.sha256(f"{source}@{commit}".encode()).hexdigest()


class Tokenizer:
    """Text to token ids and back, with the few facts about special tokens that the pipeline needs."""

    def __init__(self, model_id: str, revision: str | None = None, *, trust_remote_code: bool = False):
        from transformers import AutoTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        source = resolve(model_id, revision)
        try:
            self._inner = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise CheckpointError(f"no tokenizer could be loaded from {model_id}: {_first_line(error)}") from error
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
        self.digest = hashlib.sha256((_digest(source, TOKENIZER_FILES, commit) + rules).encode()).hexdigest()

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model without loading its weights."""

    digest: str
    """sha256 of config and weight files (a directory), or of id and commit (the hub)."""
    family: str
    num_layers: int
    d_model: int
    max_positions: int
    """0 if the config does not say."""
    taps: dict[Stream, Tap]
    """The streams that the family has."""


def model_facts(model_id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's config and hash its files.

    Raises:
        CheckpointError: if there is no such model.
        ConfigError: if its family is not supported.
    """
    from transformers import AutoConfig

    source = resolve(model_id, revision)
    try:
        whole = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, the cache and the parsers each have errors of their own
        raise CheckpointError(f"model.id {model_id} has no readable config: {_first_line(error)}") from error
    config = whole.get_text_config()
    return ModelFacts(
        digest=_digest(source, (*WEIGHT_PATTERNS, "config.json"), getattr(whole, "_commit_hash", None)),
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        taps=streams_of(config),
    )


class LanguageModel:
    """A loaded decoder in evaluation mode that yields activations at hook points."""

    def __init__(
        self,
        model_id: str,
        revision: str | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
    ):
        from transformers import AutoModelForCausalLM

        source = resolve(model_id, revision)
        try:
            self.inner = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise CheckpointError(f"no model could be loaded from {model_id}: {_first_line(error)}") from error
        self.inner.eval().requires_grad_(False).to(device)
        self._blocks, self._taps = layout_of(self.inner)
        self.device = device
        self._origin = (model_id, revision, trust_remote_code)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to it, loaded when first asked for."""
        model_id, revision, trust_remote_code = self._origin
        return Tokenizer(model_id, revision, trust_remote_code=trust_remote_code)

    def captures(self, points: Iterable[HookPoint]) -> Captures:
        """Hooks for these points, to be entered with `with`.

        Raises:
            ConfigError: if a layer is out of range or the family lacks the stream.
        """
        return Captures(self._blocks, self._taps, points)

    def run(self, captures: Captures, input_ids: Tensor) -> dict[HookPoint, Tensor]:
        """One forward pass over (B, T) ids, as far as the deepest hook; tensors (B, T, width) by hook point."""
        return captures.run(self.inner.base_model, input_ids.to(self.device))

    def run_whole(self, captures: Captures, input_ids: Tensor) -> tuple[dict[HookPoint, Tensor], Tensor]:
        """As `run`, but to the end of the model: also its last hidden state (B, T, D), ready for the head."""
        return captures.run_whole(self.inner.base_model, input_ids.to(self.device))

    def widths(self, points: Iterable[HookPoint]) -> dict[HookPoint, int]:
        """The width of the activations at each hook point, by running one token."""
        with self.captures(points) as captures:
            got = self.run(captures, torch.zeros((1, 1), dtype=torch.long))
        return {point: value.shape[-1] for point, value in got.items()}

    def drop_above(self, layer: int) -> None:
        """Free the blocks above `layer` and the head: a forward that stops there never needs them."""
        if not hasattr(self.inner.base_model, "language_model"):
            del self._blocks[layer + 1 :]
            if hasattr(self.inner, "lm_head"):
                self.inner.lm_head = nn.Identity()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
