"""One line of a file of prompts: read, checked, and what is said of it.

A line is a string, `{"prompt": …}` or `{"text": …}`, with an `id` and options of a request if one likes.
"""

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from sae_census.config import DiscoverRequest
from sae_census.errors import RequestError
from sae_census.findings import Discovery

MAX_LINE_BYTES = 8 << 20
FIELDS = frozenset({*DiscoverRequest.model_fields, "min_coverage", "id"})
"""Of a line of a batch."""
PASSED_OVER = "keys of the line that are no options were passed over: "
"""How a note of an answer begins that tells of them."""


def record_of(line: bytes) -> dict[str, Any]:
    """The fields of a line: prompt or text, id, and options of its own; a string is a prompt.

    Other keys come along, to be told of.

    Raises:
        RequestError: if it is neither an object nor a string, or has a key that looks like an option and is none.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RequestError(f"the line has {len(line)} bytes, more than {MAX_LINE_BYTES}", "line")
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}", "line") from error
    if isinstance(record, str):
        return {"prompt": record}
    if not isinstance(record, dict):
        raise RequestError('expected {"prompt": …}, {"text": …} or a string', "line")
    for name in record:
        near = difflib.get_close_matches(name.lower(), FIELDS, 1, cutoff=0.8)
        if name not in FIELDS and near:
            raise RequestError(f"a line has no option {name[:80]}; did you mean {near[0]}?", name[:80])
    return record


def with_note(answer: Discovery, others: Sequence[str]) -> Discovery:
    """The answer, with a note that tells of keys of its line that are no options."""
    if not others:
        return answer
    note = PASSED_OVER + ", ".join(name[:80] for name in others[:10])
    return answer.model_copy(
        update={"analyzed": answer.analyzed.model_copy(update={"notes": [*answer.analyzed.notes, note]})}
    )


def overridden(request: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a line before those of the command; min_coverage and min_coverage_pct are one field."""
    if given.keys() & {"min_coverage", "min_coverage_pct"}:
        request = {name: value for name, value in request.items() if name not in ("min_coverage", "min_coverage_pct")}
    return request | given


def reason_of(error: Exception) -> dict[str, str]:
    """Which field of a line is wrong, and why."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return {"field": ".".join(map(str, first["loc"])) or "prompt", "message": first["msg"]}
    return {"field": getattr(error, "field", "") or "prompt", "message": str(error)}
