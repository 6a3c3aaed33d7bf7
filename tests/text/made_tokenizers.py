"""Tiny tokenizers of every kind, trained on a few lines, as directories that a model id can name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

LINES = (
    "the river bridge flows under cold water, and a boat waits.",
    "def read(x):\n    return x[12] + 7  # the rest is 2024",
    "Zürich café naïve déjà vu don't I'm we'll",
    "日本語のテキスト 漢字 🙂 🚀 a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9 ! ? . , ; : ( ) ' \" - _ # + = / \\ < >",
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(inner: Tokenizer, trainer: Any) -> Tokenizer:
    """The tokenizer, trained on `LINES`."""
    inner.train_from_iterator(LINES * 4, trainer)
    return inner


def byte_level(size: int = 420, special: tuple[str, ...] = ("<s>", "</s>")) -> Tokenizer:
    """GPT-2 and its like."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": size, "special_tokens": list(special), "initial_alphabet": alphabet, "show_progress": False}
    return trained(inner, trainers.BpeTrainer(**how))


def tiktoken_like() -> Tokenizer:
    """Llama 3, Qwen and their like: a regex, then bytes."""
    inner = byte_level()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return inner


def sentencepiece(*, strip: bool, prepend: bool) -> Tokenizer:
    """Llama 2, Mistral (both), Gemma (neither): BPE over ▁ with byte fallback."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    # The alphabet leaves out what bytes must spell.
    letters = [line.translate({ord(c): None for c in "日本語漢字🙂🚀ü"}) for line in LINES]
    inner.train_from_iterator(
        letters * 4, trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    )
    return inner


def metaspace_bpe() -> Tokenizer:
    """Llama 2 as transformers saves it now."""
    inner = sentencepiece(strip=True, prepend=True)
    inner.normalizer = None
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return inner


def unigram() -> Tokenizer:
    """T5, XLM-R, ALBERT."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    how = {"vocab_size": 300, "unk_token": "<unk>", "special_tokens": special, "show_progress": False}
    return trained(inner, trainers.UnigramTrainer(**how))


def word_piece() -> Tokenizer:
    """BERT."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return trained(inner, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))


def end_of_word() -> Tokenizer:
    """CLIP, GPT-1: a mark at the end of words."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.BPEDecoder(suffix="</w>")
    how = {"vocab_size": 300, "special_tokens": ["<unk>", "<s>"], "show_progress": False}
    return trained(inner, trainers.BpeTrainer(end_of_word_suffix="</w>", **how))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "tiktoken_like": tiktoken_like,
    "sentencepiece": lambda: sentencepiece(strip=True, prepend=True),
    "sentencepiece_without_strip": lambda: sentencepiece(strip=False, prepend=True),
    "sentencepiece_without_prefix": lambda: sentencepiece(strip=False, prepend=False),
    "metaspace_bpe": metaspace_bpe,
    "unigram": unigram,
    "word_piece": word_piece,
    "end_of_word": end_of_word,
}


def save(inner: Any, folder: Path, **roles: str) -> Path:
    """A directory that is taken for a model's; `inner` may be one of `tokenizers` or of transformers."""
    if isinstance(inner, Tokenizer):
        known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        known = {name: token for name, token in known.items() if inner.token_to_id(token) is not None}
        inner = PreTrainedTokenizerFast(tokenizer_object=inner, **(known | roles))
    inner.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").touch()
    return folder


def adding_bos(inner: Tokenizer, bos: str = "<s>") -> Tokenizer:
    """The tokenizer, with a rule that puts a BOS before every text."""
    rule = f"{bos} $A"
    inner.post_processor = processors.TemplateProcessing(single=rule, special_tokens=[(bos, inner.token_to_id(bos))])
    return inner


def by_bytes() -> ByT5Tokenizer:
    """A tokenizer written in Python: it has no backend and tells no offsets."""
    return ByT5Tokenizer(extra_ids=0)
