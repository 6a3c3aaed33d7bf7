"""Prompts and texts as sequences of tokens that know their text, and their continuations."""

from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from sae_census.config import DiscoverRequest
from sae_census.errors import ConfigError, RequestError
from sae_census.io.tokens.tokenizer import Tokenizer

Mode = Literal["text", "prompt", "prompt+gen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Tokens to be analysed."""

    mode: Mode
    ids: list[int]
    """Never empty."""
    chars: list[tuple[int, int]]
    """Characters of `text` that each token stands for, without a gap between them."""
    text: str
    given: str
    """The text or prompt of the request."""
    num_generated: int = 0
    num_truncated: int = 0


def sequence_of(request: DiscoverRequest, tokenizer: Tokenizer, max_tokens: int) -> Sequence:
    """The tokens of a request, before any continuation. One BOS comes first if the tokenizer adds one itself.

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
    except ConfigError as error:
        raise RequestError(str(error), field) from error
    if len(behind_bos := tokenizer.with_bos(ids)) > len(ids):
        ids, chars = behind_bos, [(0, 0), *chars]
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
    texts = tokenizer.token_texts([[sequence.ids[-1], *generated]])[0][1:]
    ends = list(accumulate(map(len, texts), initial=len(sequence.text)))
    return replace(
        sequence,
        ids=[*sequence.ids, *generated],
        chars=[*sequence.chars, *pairwise(ends)],
        text=sequence.text + "".join(texts),
        num_generated=len(generated),
    )
