"""Documents to contexts: the rules that decide which tokens stand beside which.

`concat` joins documents end to end and cuts every T tokens; `document` gives each document contexts of its
own. With BOS on, every run (a document's part in a context) begins with one: its own, if its text brought one there
(a chat template writes it), else one put before it; further ones inside a text stay as they are. A context remembers
which document each run belongs to, so that no span crosses a document.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class Context:
    """Up to T tokens and the documents they come from."""

    input_ids: list[int] = field(default_factory=list)
    document_ids: list[str] = field(default_factory=list)
    document_starts: list[int] = field(default_factory=list)
    """Where each document's run begins; ascending, the first is 0."""

    def extend(self, document_id: str, ids: list[int]) -> None:
        """Append a run of one document."""
        self.document_ids.append(document_id)
        self.document_starts.append(len(self.input_ids))
        self.input_ids.extend(ids)


@dataclass(slots=True, kw_only=True)
class Packer:
    """Packs documents in the order they come: exhaust `pack`, then read the count."""

    context_length: int
    packing: Literal["concat", "document"]
    long_documents: Literal["chunk", "truncate"]
    bos_id: int | None
    """None: no BOS."""
    doubles_bos: bool = False
    """Put a BOS before text that brought its own, too, as preparations of format 1 do."""
    tokens_truncated: int = 0
    """Tokens that truncation has dropped."""

    def pack(self, documents: Iterable[tuple[str, list[int]]]) -> Iterator[Context]:
        """Contexts of these (document id, token ids), each of T tokens; only the last of `concat`, and any
        of `document`, may be shorter.
        """
        context = Context()
        for document_id, ids in documents:
            start = 0
            while start < len(ids):
                bos = [] if self.bos_id is None or self._has_bos(ids[start]) else [self.bos_id]
                room = self.context_length - len(context.input_ids) - len(bos)
                context.extend(document_id, bos + ids[start : start + room])
                start += room
                if self.packing == "document" or len(context.input_ids) == self.context_length:
                    yield context
                    context = Context()
                if self.packing == "document" and self.long_documents == "truncate":
                    self.tokens_truncated += max(len(ids) - start, 0)
                    break
        if context.input_ids:
            yield context

    def _has_bos(self, first: int) -> bool:
        return first == self.bos_id and not self.doubles_bos
