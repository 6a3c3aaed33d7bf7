"""Prompts and texts as sequences of tokens that know their text, and their continuations."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.config import DiscoverRequest
from pipeline.errors import ConfigError, RequestError
from pipeline.io.tokenizer import Tokenizer

Mode = Literal["text", "prompt", "prompt+gen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Tokens to be analysed."""

    mode: Mode
    ids: list[int]
    """Never empty."""
    chars: list[tuple[int, int]]
    """Characters of `text` that each token stands for."""
    text: str
    given: str
    """The text or prompt of the request."""
    num_generated: int = 0
    num_truncated: int = 0


def sequence_of(request: DiscoverRequest, tokenizer: Tokenizer, max_tokens: int) -> Sequence:
    """The tokens of a request, before any continuation. A BOS comes first if the tokenizer adds one itself.

    Args:
        request: with a text or a prompt.
        tokenizer: of the model.
        max_tokens: that the model, or the server, takes together with a continuation.

    Raises:
        RequestError: if it does not fit, or gives no token.
    """
    field = "text" if request.text is not None else "prompt"
    given = request.text if request.text is not None else request.prompt or ""
    mode: Mode = "text" if request.text is not None else "prompt+gen" if request.generate else "prompt"
    asked = given
    if request.chat_template:
        if mode == "text":
            raise RequestError("chat_template wraps a prompt; raw text is analysed as it is", "chat_template")
        try:
            given = tokenizer.as_chat(given)
        except ConfigError as error:
            raise RequestError(str(error), "chat_template") from error
    try:
        ids, chars = tokenizer.encode_with_offsets(given)
    except (TypeError, UnicodeEncodeError) as error:
        raise RequestError(f"{field} is not valid Unicode text", field) from error
    if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids, chars = [tokenizer.bos_id, *ids], [(0, 0), *chars]
    if not ids:
        raise RequestError(f"{field} gives no token", field)
    room = max_tokens - (request.gen_tokens if mode == "prompt+gen" else 0)
    if len(ids) > room and not (request.truncate and room > 0):
        more = f" beside gen_tokens={request.gen_tokens}" if mode == "prompt+gen" else ""
        raise RequestError(
            f"{field} has {len(ids)} tokens, and there is room for {max(room, 0)}{more}; "
            + ("shorten it or use truncate=true" if room > 0 else "ask for fewer gen_tokens"),
            field if room > 0 else "gen_tokens",
        )
    text = given if len(ids) <= room else given[: chars[room - 1][1]]
    return Sequence(
        mode=mode,
        ids=ids[:room],
        chars=chars[:room],
        text=text,
        given=asked,
        num_truncated=max(len(ids) - room, 0),
    )


def continued(sequence: Sequence, generated: Many[int], tokenizer: Tokenizer) -> Sequence:
    """The sequence with its continuation."""
    # After the last token of the prompt, because decoders strip the space before a text's first word.
    last = sequence.ids[-1]
    skipped = len(tokenizer.decode_many([[last]])[0])
    rows = [[last, *generated[:n]] for n in range(1, len(generated) + 1)]
    texts = [text[skipped:] for text in tokenizer.decode_many(rows)]
    # A prefix may end inside a character, which then shows as �: it belongs to the token that completes it.
    ends = [len(sequence.text) + len(text.rstrip("\ufffd")) for text in texts]
    whole = sequence.text + (texts[-1] if texts else "")
    ends = [*ends[:-1], len(whole)] if ends else []
    starts = [len(sequence.text), *ends[:-1]]
    return replace(
        sequence,
        ids=[*sequence.ids, *generated],
        chars=[*sequence.chars, *zip(starts, ends, strict=False)],
        text=whole,
        num_generated=len(generated),
    )
