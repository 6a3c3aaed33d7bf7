"""What decides the ids that a tokenizer gives, as one digest: the same rules from any file have the same one."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

_DECIDES_NO_ID = ("version", "truncation", "padding", "post_processor", "decoder")
"""Parts of a fast tokenizer's JSON. We cut and fill ourselves, and add special tokens ourselves."""
_OF_THE_CLASS = ("__call__", "encode", "_encode_plus", "_batch_encode_plus", "tokenize", "_tokenize")


def rules_digest(inner: Any, special: dict[str, object]) -> str:
    """sha256 of the rules of a tokenizer of transformers.

    Of a fast one: normaliser, pre-tokeniser, model with vocabulary and merges, added tokens. Of a Python one, whose
    rules are code: its class, its vocabulary, its added tokens, its settings, the bytes of its vocabulary files, and
    of its module if that is not transformers' own. What only decodes, pads, cuts or makes templates does not count.

    Args:
        inner: the tokenizer.
        special: what else counts: special ids and the BOS rule.
    """
    backend = getattr(inner, "backend_tokenizer", None)
    rules = _of_python(inner) if backend is None else _of_backend(json.loads(backend.to_str()))
    # A class may change texts before its backend sees them; those of transformers that do not are all alike.
    if backend is not None and (own := _own_code(type(inner))):
        rules["class"] = own
    rules["split_special_tokens"] = bool(getattr(inner, "split_special_tokens", False))
    return hashlib.sha256(json.dumps([rules, special], sort_keys=True).encode()).hexdigest()


def _of_backend(rules: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = _without_defaults({k: v for k, v in rules.items() if k not in _DECIDES_NO_ID})
    kept["added_tokens"] = sorted(kept.get("added_tokens", []), key=lambda token: token.get("id", 0))
    return kept


def _without_defaults(value: Any) -> Any:
    """The rules without what is null or false, so that a library that learns of a new switch names them as before."""
    if isinstance(value, dict):
        return {k: _without_defaults(v) for k, v in value.items() if v is not None and v is not False}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value


def _of_python(inner: Any) -> dict[str, Any]:
    names = getattr(inner, "vocab_files_names", {})
    paths = {name: getattr(inner, name, None) or inner.init_kwargs.get(name) for name in names}
    return {
        "class": _code(type(inner)),
        "unknown": inner.unk_token_id,
        "vocabulary": inner.get_vocab(),
        "added_tokens": {i: [str(t), *_flags(t)] for i, t in sorted(inner.added_tokens_decoder.items())},
        "settings": {k: v for k, v in sorted(inner.init_kwargs.items()) if k not in names and _decides(k, v)},
        "files": {
            name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for name, path in sorted(paths.items())
            if isinstance(path, str) and Path(path).is_file()
        },
    }


def _flags(token: Any) -> list[bool]:
    return [token.single_word, token.lstrip, token.rstrip, token.normalized, token.special]


def _decides(name: str, value: Any) -> bool:
    """Whether a setting may decide ids: those that name places, lengths, padding or templates do not."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return plain and not name.startswith("_") and not name.endswith("_token") and name not in _INDIFFERENT


_INDIFFERENT = frozenset(
    (
        "name_or_path", "tokenizer_file", "tokenizer_class", "processor_class", "chat_template", "model_max_length",
        "max_length", "stride", "padding_side", "truncation_side", "truncation_strategy", "pad_token_type_id",
        "pad_to_multiple_of", "clean_up_tokenization_spaces", "backend", "is_local",
        "local_files_only", "trust_remote_code", "spaces_between_special_tokens", "use_fast", "auto_map",
    )
)  # fmt: skip


def _own_code(kind: type) -> list[str] | None:
    """The code of the classes that encode in their own way, above those that transformers has for all."""
    base = next((c for c in kind.__mro__ if c.__name__ in ("TokenizersBackend", "PreTrainedTokenizerFast")), object)
    changed = any(getattr(kind, name, None) is not getattr(base, name, None) for name in _OF_THE_CLASS)
    return _code(kind) if changed else None


def _code(kind: type) -> list[str]:
    """The name of a class, and a digest of its module's file if the class is not of transformers."""
    if kind.__module__.startswith("transformers."):
        return [kind.__qualname__]
    try:
        return [kind.__qualname__, hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()]
    except (OSError, TypeError):  # made in a notebook
        return [kind.__qualname__]
