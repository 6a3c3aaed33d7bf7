"""The tokenizer that a GGUF file describes: all of its metadata that decides ids, or a refusal by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sae_census.errors import CheckpointError
from sae_census.io.loading.gguf_rules import PRE_RULES

RULES_VERSION = 1
"""Raise it when a file's tokenizer comes out in another way: converted files are cached under it."""
_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Our names of roles, and those in the keys of a file, which spells one so."""
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}
"""Where a sentencepiece vocabulary has them if the file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """What `tokenizers` and transformers need to make it."""

    backend: Tokenizer
    special: dict[str, str]
    """Tokens by role, as `bos_token`."""
    chat_template: str | None


def read_tokenizer(path: Path) -> GgufTokenizer | None:
    """The tokenizer of a GGUF file; None for Gemma's, which transformers builds as llama.cpp does.

    Raises:
        CheckpointError: naming the kind of tokenizer, or the way of splitting text, that is not known here.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    about = {
        name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.")
    }
    architecture = str(fields["general.architecture"].contents())
    kind = about.get("model")
    if kind == "gemma4" or (kind == "llama" and architecture.startswith("gemma")):
        return None
    if kind == "gpt2":
        return _byte_level(about, path)
    if kind == "llama":
        return _sentencepiece(about)
    raise CheckpointError(
        f"{path} has a tokenizer of the kind {kind!r}; expected gpt2, llama or gemma4; give the model as a directory "
        "with its tokenizer.json"
    )


def _byte_level(about: dict[str, Any], path: Path) -> GgufTokenizer:
    rule = PRE_RULES.get(about.get("pre", ""))
    if rule is None:
        raise CheckpointError(
            f"{path} says tokenizer.ggml.pre={about.get('pre')!r}, a way of splitting text that is not known here, so "
            f"its tokens would be wrong; known are {', '.join(sorted(PRE_RULES))}; give the model as a directory with "
            "its tokenizer.json"
        )
    tokens = _tokens(about)
    # A token may contain the space that parts the two sides of a merge, but only as its first character.
    cuts = [(merge, merge.index(" ", 1)) for merge in about["merges"]]
    merges = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    backend = Tokenizer(models.BPE(_ids(tokens, path), merges, ignore_merges=rule.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in rule.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    ids = _special_ids(about, {})
    if not rule.has_bos:
        ids.pop("bos", None)
    return _finished(backend, about, tokens, ids, adds_bos=rule.adds_bos)


def _sentencepiece(about: dict[str, Any]) -> GgufTokenizer:
    tokens = _tokens(about)
    ids = _special_ids(about, _SENTENCEPIECE_IDS)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = (
        [tuple(merge.split(" ")) for merge in about["merges"]]
        if "merges" in about
        else _merges_by_score(vocabulary, dict(zip(tokens, about["scores"], strict=True)))
    )
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=tokens[ids["unk"]], fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", "▁")
    if about.get("add_space_prefix", True):
        # Before every text, and before every one that follows an added token, whether a space is there or not.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = replace
        backend.decoder = decoders.Sequence(steps)
    return _finished(backend, about, tokens, ids, adds_bos=True)


def _merges_by_score(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the token with the best score first."""
    found = [
        (scores[token], -i, token[:cut], token[cut:])
        for token, i in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, _, left, right in sorted(found, key=lambda one: (one[0], one[1]), reverse=True)]


def _tokens(about: dict[str, Any]) -> list[str]:
    return [token or f"[EMPTY_{i}]" for i, token in enumerate(about["tokens"])]


def _ids(tokens: list[str], path: Path) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(f"{path} has the token {twice!r} twice; is the file damaged?")
    return ids


def _special_ids(about: dict[str, Any], otherwise: dict[str, int]) -> dict[str, int]:
    """The ids of the roles that there are; one beyond the vocabulary is none, as llama.cpp has it."""
    ids = otherwise | {
        role: int(about[f"{name}_token_id"]) for role, name in _ROLES.items() if f"{name}_token_id" in about
    }
    return {role: i for role, i in ids.items() if i < len(about["tokens"])}


def _finished(
    backend: Tokenizer, about: dict[str, Any], tokens: list[str], ids: dict[str, int], *, adds_bos: bool
) -> GgufTokenizer:
    """With its added tokens, and the rule for BOS and EOS."""
    types = about.get("token_type", [])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, t in zip(tokens, types) if t == _CONTROL]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token, t in zip(tokens, types) if t == _USER_DEFINED])
    special = {role: tokens[i] for role, i in ids.items()}
    begins = "bos" in ids and bool(about.get("add_bos_token", adds_bos))
    ends = "eos" in ids and bool(about.get("add_eos_token", False))
    around = [*([special["bos"]] if begins else []), "$A", *([special["eos"]] if ends else [])]
    if len(around) > 1:
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(special[role], ids[role]) for role in ("bos", "eos") if role in ids]
        )
    return GgufTokenizer(
        backend=backend,
        special={f"{role}_token": token for role, token in special.items()},
        chat_template=about.get("chat_template"),
    )
