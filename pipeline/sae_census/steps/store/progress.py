"""What a run says while it works: a live line for people, plain lines for logs, JSON lines in the store.

The lines in the store are what `sae-census status` reads. They are rewritten whole every few seconds, the last of them
a sign of life, so a killed run loses only its last seconds of them; full files are closed and the next begun.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sae_census.errors import StorageError
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.store import events, layout

BEAT_SECONDS = 5.0
"""Between two signs of life in the store."""
_PLAIN_SECONDS = 15.0
_FILE_BYTES = 1 << 16
_URGENT = {"run", "plan", "quarantined", "worker_lost", "worker_refused", "done", "failed"}


def new_run() -> str:
    """A name for a run that begins now: names sort by time (UTC, milliseconds), and no two are alike."""
    now = time.time()
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}{int(now * 1000) % 1000:03d}-{uuid.uuid4().hex[:6]}"


class RunLog:
    """What a run says, to people and in its events; one for a run."""

    def __init__(
        self,
        blobs: LocalBlobs,
        key: str,
        listener: Callable[[str], None] | None = None,
        file_bytes: int = _FILE_BYTES,
    ):
        """Write lines on stderr, or to a listener; events go to `key`, and to the next file once one is full."""
        self._blobs, self._key, self._listener, self._file_bytes = blobs, key, listener, file_bytes
        self._console = Console(stderr=True)
        self._lines: list[str] = []
        self._num_files = 0
        self._weaker = 0
        self._lock = threading.RLock()
        self._beats = False
        self._stage: Stage | None = None
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
        with self._lock:
            self._lines.append(events.line(kind, facts))
        if kind == "worker_lost":
            self.retries += 1
            self.say(f"worker lost ({facts['kind']}): its task is tried again elsewhere")
        if kind == "worker_refused":
            self.say(f"worker refused on node {facts['node']}: {facts['message']}")
        if kind == "waiting":
            self.say(f"waiting for the cluster: {facts['message']}")
        if kind in _URGENT or time.monotonic() - self._flushed > BEAT_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the events so far."""
        with self._lock:
            self._flushed = time.monotonic()
            for sentence in self._blobs.weaker[self._weaker :]:
                self._lines.append(events.line("weaker_promise", {"message": sentence}))
                self._weaker += 1
            lines = list(self._lines)
            if self._beats:
                lines.append(events.line("alive", self._stage.counts() if self._stage else {}))
            if not lines:
                return
            body = ("\n".join(lines) + "\n").encode()
            self._blobs.put(layout.next_file(self._key, self._num_files), body)
            if len(body) > self._file_bytes:
                self._lines, self._num_files = [], self._num_files + 1

    @contextmanager
    def running(self, facts: dict[str, Any]) -> Iterator[None]:
        """The time of a run: signs of life go to the store, and how it ended if not well."""
        self.event("run", {**facts, "host": socket.gethostname(), "pid": os.getpid()})
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        self._beats = True
        thread.start()
        try:
            yield
        except BaseException as error:
            stop.set()
            self._beats = False
            message = (str(error).splitlines() or [""])[0]
            with contextlib.suppress(StorageError):  # the first error is the one to tell
                self.event("failed", {"kind": type(error).__name__, "message": message})
            raise
        finally:
            stop.set()
            thread.join()
            self._beats = False
        self.flush()

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(StorageError):  # the run itself will meet it, and say so
                self.flush()

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
            stage = self._stage = Stage(self, bar, name, total, unit)
            yield stage
            stage.close()
        self.event("stage_done", {"stage": name, "seconds": round(stage.seconds, 2)})
        self.flush()


class Stage:
    """Counts what is done of a stage."""

    def __init__(self, log: RunLog, bar: Progress, name: str, total: int, unit: str):
        self._log, self._bar, self._name, self._total, self._unit = log, bar, name, total, unit
        self._task = bar.add_task(name, total=total, note="")
        self._began = self._spoke = time.monotonic()
        self._done = self._amount = 0

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self._began

    def counts(self) -> dict[str, Any]:
        """How far it is."""
        return {"stage": self._name, "done": self._done, "total": self._total}

    def advance(self, amount: int = 0) -> None:
        """One more is done; `amount` counts towards the rate (tokens)."""
        self._done += 1
        self._amount += amount
        self._bar.update(self._task, advance=1, note=self._note())
        if not self._log.is_live and time.monotonic() - self._spoke > _PLAIN_SECONDS:
            self._spoke = time.monotonic()
            left = self.seconds / self._done * (self._total - self._done)
            self._log.say(
                ", ".join(
                    filter(None, [f"{self._name}: {self._done}/{self._total}", self._note(), f"{left:.0f} s left"])
                )
            )

    def close(self) -> None:
        """The stage's last word."""
        if not self._log.is_live and self._total:
            self._log.say(
                ", ".join(
                    filter(None, [f"{self._name}: {self._done}/{self._total} in {self.seconds:.1f} s", self._note()])
                )
            )

    def _note(self) -> str:
        rate = self._amount / max(self.seconds, 1e-9)
        digits = ",.0f" if rate >= 10 else ".2g"
        parts: Iterable[str] = (
            f"{rate:{digits}} {self._unit}/s" if self._amount else "",
            f"{self._log.retries} retries" if self._log.retries else "",
            f"{self._log.quarantined} quarantined" if self._log.quarantined else "",
        )
        return ", ".join(part for part in parts if part)
