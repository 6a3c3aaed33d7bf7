"""Config of the HTTP server: who may ask for how much."""

from pydantic import Field, model_validator

from sae_census.config.discover import DiscoveryConfig
from sae_census.config.sections import Section, StoreConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LimitsConfig(Section):
    """What one request, and all of them together, may take."""

    body_bytes: int = Field(default=1 << 20, ge=1)
    """Of a request."""
    gen_tokens: int = Field(default=512, ge=1)
    """New tokens of a continuation."""
    seconds: float = Field(default=120.0, gt=0)
    """For generating one continuation."""
    concurrent: int = Field(default=128, ge=1)
    """Requests that run or wait; more are told to come back."""
    connections: int = Field(default=256, ge=1)
    """Open ones. For a further one, the longest that brings no whole request or takes no answer is closed; where all
    are busy, it is told to come back."""
    read_seconds: float = Field(default=30.0, gt=0)
    """For the head of a request, and again for its body."""


class ServeConfig(DiscoveryConfig):
    """`sae-census serve`: discovery and catalogs over HTTP."""

    store: StoreConfig = StoreConfig()
    """Whose catalogs can be read."""
    host: str = "127.0.0.1"
    """Where to listen; anything but loopback needs a token."""
    port: int = Field(default=8000, ge=0, lt=1 << 16)
    """0: any free one."""
    token: str | None = Field(default=None, min_length=8)
    """Clients send it as `Authorization: Bearer …`."""
    limits: LimitsConfig = LimitsConfig()
    replicas: int = Field(default=1, ge=1)
    """More than one run on Ray Serve."""

    @model_validator(mode="after")
    def _guarded(self) -> "ServeConfig":
        if self.host not in LOOPBACK and self.token is None:
            raise ValueError(f"host {self.host} can be reached from outside: set token, or use 127.0.0.1")
        return self
