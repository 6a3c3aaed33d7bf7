"""Connections of the HTTP server: who holds one without asking is let go, so that nobody is locked out.

A request's head has to come in time (its body, too: `cli.http.BodyLimit`). Where no connection is left, the one
that has gone longest without a whole request, or with an answer that nobody reads, makes room for the next.
"""

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sae_census.config.serve import LimitsConfig


class Connection(H11Protocol):
    """One connection, which has to earn its place."""

    def __init__(self, *args: Any, limits: LimitsConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._since = self.loop.time()
        self._late: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Whether its request is whole and waits for our answer."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_started

    @property
    def _is_open(self) -> bool:
        return not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's own narrowing
        """Make room, if there is none, and expect a request."""
        super().connection_made(transport)
        others = [one for one in self.connections if isinstance(one, Connection) and one is not self and one._is_open]
        idle = [one for one in others if not one.is_busy]
        if len(others) >= self._limits.connections and idle:
            min(idle, key=lambda one: one._since).transport.abort()
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Expect the rest of a request's head in time; a byte now and then does not put that off."""
        if self._late is None and self.cycle is not None and self.cycle.response_complete:
            self._expect()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._forget()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._since = self.loop.time()
        self._late = self.loop.call_later(self._limits.read_seconds, self.transport.abort)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def protocol(limits: LimitsConfig) -> Any:
    """What uvicorn takes as its `http`."""
    return partial(Connection, limits=limits)
