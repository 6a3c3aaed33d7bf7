"""What a run says while it works: a live line for people, plain lines for logs, JSON lines in the store."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.io.blobs import LocalBlobs

_PLAIN_SECONDS = 15.0
_FLUSH_SECONDS = 5.0


class Voice:
    """Tells what happens; one for a run."""

    def __init__(self, blobs: LocalBlobs, key: str, listener: Callable[[str], None] | None = None):
        """Speak on stderr, or to a listener instead; events go to `key`."""
        self._blobs, self._key, self._listener = blobs, key, listener
        self._console = Console(stderr=True)
        self._lines: list[str] = []
        self._flushed = 0.0
        self.retries = 0
        self.quarantined = 0

    @property
    def is_live(self) -> bool:
        """Whether a bar can be drawn."""
        return self._listener is None and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line for people."""
        if self._listener is not None:
            self._listener(text)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, kind: str, facts: dict[str, Any]) -> None:
        """A line for machines; what went wrong is also said aloud."""
        self._lines.append(json.dumps({"at": round(time.time(), 3), "event": kind, **facts}))
        if kind == "worker_lost":
            self.retries += 1
            self.say(f"worker lost ({facts['kind']}): its task is tried again elsewhere")
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the events so far."""
        self._flushed = time.monotonic()
        if self._lines:
            self._blobs.put(self._key, ("\n".join(self._lines) + "\n").encode())

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator["Stage"]:
        """A stage of known length."""
        self.event("stage", {"stage": name, "total": total})
        columns = [
            TextColumn("{task.description}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        with Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not self.is_live) as bar:
            stage = Stage(self, bar, name, total, unit)
            yield stage
            stage.close()
        self.event("stage_done", {"stage": name, "seconds": round(stage.seconds, 2)})
        self.flush()


class Stage:
    """Counts what is done of a stage."""

    def __init__(self, voice: Voice, bar: Progress, name: str, total: int, unit: str):
        self._voice, self._bar, self._name, self._total, self._unit = voice, bar, name, total, unit
        self._task = bar.add_task(name, total=total, note="")
        self._began = self._spoke = time.monotonic()
        self._done = self._amount = 0

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._began

    def advance(self, amount: int = 0) -> None:
        """One more is done; `amount` counts towards the rate (tokens)."""
        self._done += 1
        self._amount += amount
        self._bar.update(self._task, advance=1, note=self._note())
        if not self._voice.is_live and time.monotonic() - self._spoke > _PLAIN_SECONDS:
            self._spoke = time.monotonic()
            left = self.seconds / self._done * (self._total - self._done)
            self._voice.say(
                ", ".join(
                    filter(None, [f"{self._name}: {self._done}/{self._total}", self._note(), f"{left:.0f} s left"])
                )
            )

    def close(self) -> None:
        """The stage's last word."""
        if not self._voice.is_live and self._total:
            self._voice.say(
                ", ".join(
                    filter(None, [f"{self._name}: {self._done}/{self._total} in {self.seconds:.1f} s", self._note()])
                )
            )

    def _note(self) -> str:
        parts: Iterable[str] = (
            f"{self._amount / max(self.seconds, 1e-9):,.0f} {self._unit}/s" if self._amount else "",
            f"{self._voice.retries} retries" if self._voice.retries else "",
            f"{self._voice.quarantined} quarantined" if self._voice.quarantined else "",
        )
        return ", ".join(part for part in parts if part)
