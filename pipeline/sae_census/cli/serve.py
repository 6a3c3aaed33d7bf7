"""`sae-census serve`: discovery and catalogs over HTTP. The door to FastAPI.

Requests run one after another in one thread, so that answers are the same whatever else is asked; more than the
limit of them are told to come back. Nothing is loaded but what the config names, and no answer holds a path or a
traceback.
"""

import asyncio
import hmac
import html
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field

from sae_census.cli import command, connections
from sae_census.cli.http import RESPONSES, BodyLimit, LocalHosts, Room, answer_errors, exact, hung_up
from sae_census.cli.status import text
from sae_census.config import DiscoverRequest, ServeConfig
from sae_census.config.serve import LOOPBACK, LimitsConfig
from sae_census.errors import ConfigError, RequestError
from sae_census.findings import Discovery
from sae_census.flows.catalog.reader import Catalog, catalog_names
from sae_census.flows.census.status import runs
from sae_census.flows.discovery.discover import open_discoverer, plan_of
from sae_census.io.model.generation import Patience
from sae_census.io.store.blobs import LocalBlobs
from sae_census.steps.discovery.discoverer import Discoverer

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]


class Health(BaseModel):
    """What is loaded."""

    status: str
    version: str
    model_id: str
    saes: list[dict[str, Any]]


class _Parameters(BaseModel):
    """Of a URL; names that are none are refused."""

    model_config = ConfigDict(extra="forbid")


class PageOf(_Parameters):
    """Which features to list."""

    hook_point: str | None = None
    sae: str | None = None
    start: Annotated[int, Field(ge=0, lt=1 << 40)] = 0
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class SearchFor(_Parameters):
    """What to search for."""

    q: Annotated[str, Field(min_length=1, max_length=200)]
    limit: Annotated[int, Field(ge=1, le=500)] = 50


class NewestRuns(_Parameters):
    """How many runs to tell of."""

    last: Annotated[int, Field(ge=1, le=100)] = 10


_EXAMPLE = {
    "prompt": "The capital of France is",
    "generate": True,
    "gen_tokens": 16,
    "return_top_x": 5,
    "score_mode": "mean×coverage",
    "min_coverage_pct": 0.1,
    "first_positions": 1,
    "seed": 42,
}


def make_app(config: ServeConfig, load: Callable[[], Discoverer]) -> FastAPI:
    """The application around one discoverer, which is loaded now."""
    queue = _Queue(load, config.limits)
    api = FastAPIOffline(
        redoc_url=None,
        title="SAE Census",
        version=version("sae-census"),
        description="Which features of sparse autoencoders does a text use, and what is known of them?",
        responses=RESPONSES,
    )
    bearer = HTTPBearer(auto_error=False)

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if not (given and hmac.compare_digest(given.credentials.encode(), (config.token or "").encode())):
            raise HTTPException(401, "a token is needed: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    @api.get("/v1/health")
    def health() -> Health:
        """What is loaded; needs no token."""
        return Health(
            status="ok",
            version=version("sae-census"),
            model_id=queue.discoverer.model_id,
            saes=queue.discoverer.describe(),
        )

    admitted = [Depends(authorised)] if config.token else []
    guarded = APIRouter(prefix="/v1", dependencies=admitted)
    _offer_discovery(guarded, queue)
    _offer_catalogs(guarded, _Catalogs(config.store.root))
    _offer_status(guarded, config.store.root)
    api.include_router(guarded)
    pages = APIRouter(dependencies=admitted, include_in_schema=False)
    _offer_status_page(pages, config.store.root)
    api.include_router(pages)
    answer_errors(api)
    limits = config.limits
    api.add_middleware(BodyLimit, max_bytes=limits.body_bytes, seconds=limits.read_seconds)
    if config.host in LOOPBACK:  # a page of a stranger must not reach us under a name of its own
        api.add_middleware(LocalHosts, names=LOOPBACK)
    api.add_middleware(Room, num_requests=limits.connections)
    _document(api, limits)
    return api


def _document(api: FastAPI, limits: LimitsConfig) -> None:
    """Make the document say what this server keeps: bounds to the digit, and its own bound of a continuation."""
    made = api.openapi

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            found = exact(made())
            asked = DiscoverRequest.model_json_schema()["properties"]["gen_tokens"]
            told = [] if asked["default"] <= limits.gen_tokens else ["gen_tokens"]
            found["components"]["schemas"]["DiscoverRequest"] |= {
                "if": {
                    "properties": {"prompt": {"type": "string"}, "generate": {"const": True}},
                    "required": ["prompt"],
                },
                "then": {"properties": {"gen_tokens": {"maximum": limits.gen_tokens}}, "required": told},
            }
            api.openapi_schema = found
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _offer_discovery(routes: APIRouter, queue: "_Queue") -> None:
    example = {"requestBody": {"content": {"application/json": {"example": _EXAMPLE}}}}

    @routes.post("/sae/features/discover", openapi_extra=example)
    async def discover(request: DiscoverRequest, http: Request) -> Discovery:
        """Find the features that a prompt or text uses, with scores and evidence."""
        return await queue.run(request, http)


def _offer_catalogs(routes: APIRouter, catalogs: "_Catalogs") -> None:
    @routes.get("/catalogs")
    def list_catalogs() -> list[dict[str, Any]]:
        """All catalogs of the store."""
        return catalogs.describe()

    @routes.get("/catalogs/{name}/features")
    def features(name: Name, page: Annotated[PageOf, Query()]) -> list[dict[str, Any]]:
        """Features by rank."""
        return catalogs.get(name).page(page.start, page.limit, page.hook_point, page.sae)

    @routes.get("/catalogs/{name}/features/{key:path}")
    def feature(name: Name, key: str) -> dict[str, Any]:
        """One feature and its spans; the key is `hook_point/sae/feature_id`."""
        catalog, parts = catalogs.get(name), key.rsplit("/", 2)
        try:
            if len(parts) != 3 or not re.fullmatch(r"[0-9]{1,9}", parts[2]):
                raise KeyError(key)
            found = catalog.feature(parts[0], parts[1], int(parts[2]))
        except KeyError as error:
            message = "there is no such feature; expected hook_point/sae/feature_id"
            raise RequestError(message, "key", unknown=True) from error
        return found | {"spans": catalog.spans(parts[0], parts[1], int(parts[2])).to_pylist()}

    @routes.get("/catalogs/{name}/search")
    def search(name: Name, wanted: Annotated[SearchFor, Query()]) -> list[dict[str, Any]]:
        """Features whose label contains `q`, or whose strongest spans peak on a token that does."""
        return catalogs.get(name).search(wanted.q, wanted.limit)


def _offer_status(routes: APIRouter, root: str) -> None:
    @routes.get("/status")
    def status(newest: Annotated[NewestRuns, Query()]) -> list[dict[str, Any]]:
        """What the newest runs of the store are doing or did, newest first."""
        return [run.public().to_json() for run in islice(runs(LocalBlobs(root)), newest.last)]


def _offer_status_page(routes: APIRouter, root: str) -> None:
    @routes.get("/status", response_class=HTMLResponse)
    def page() -> str:
        """The same for people; it reloads itself."""
        found = islice(runs(LocalBlobs(root)), 10)
        told = "\n\n".join(text(run.public(), time.time()) for run in found) or "no runs yet"
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">'
            f"<title>SAE Census: runs</title><pre>{html.escape(told)}</pre></html>"
        )


class _Queue:
    """Runs requests one by one, and refuses those that would wait too long.

    The thread that answers has loaded the model, too: PyTorch gives every thread that computes a team of its own, and
    OpenMP lets teams sleep between operations if there are more members than cores. A request then takes half as long
    again.
    """

    def __init__(self, load: Callable[[], Discoverer], limits: LimitsConfig):
        self._limits = limits
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="discover")
        self.discoverer = self._pool.submit(load).result()
        self._turn = asyncio.Lock()
        self._admitted = 0

    async def run(self, request: DiscoverRequest, http: Request) -> Discovery:
        """The answer; work that nobody waits for any more ends with the token at hand."""
        limits = self._limits
        if request.gen_tokens > limits.gen_tokens and request.prompt is not None and request.generate:
            raise RequestError(f"this server generates at most {limits.gen_tokens} tokens", "gen_tokens")
        if self._admitted >= limits.concurrent:
            raise HTTPException(429, "too many requests wait", {"Retry-After": "5"})
        self._admitted += 1
        gone = threading.Event()
        work, leaving = asyncio.ensure_future(self._in_turn(request, gone)), asyncio.ensure_future(hung_up(http))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(400, "the client hung up")
            return work.result()
        finally:
            gone.set()
            work.cancel()
            leaving.cancel()
            self._admitted -= 1

    async def _in_turn(self, request: DiscoverRequest, gone: threading.Event) -> Discovery:
        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, request, gone)

    def _answer(self, request: DiscoverRequest, gone: threading.Event) -> Discovery:
        return self.discoverer.discover(request, Patience(until=time.monotonic() + self._limits.seconds, gone=gone))


class _Catalogs:
    """Open catalogs, each at its newest snapshot."""

    def __init__(self, root: str):
        self._root, self._open = root, dict[str, Catalog]()

    def get(self, name: str) -> Catalog:
        try:
            newest = Catalog(self._root, name)
        except ConfigError as error:
            raise RequestError("there is no such catalog; GET /v1/catalogs lists them", "name", unknown=True) from error
        if name not in self._open or self._open[name].digest != newest.digest:
            self._open[name] = newest
        return self._open[name]

    def describe(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "snapshot": catalog.number,
                "digest": catalog.digest,
                "saes": catalog.saes,
                "tokens": catalog.manifest.coverage.tokens,
            }
            for name in catalog_names(self._root)
            for catalog in [self.get(name)]
        ]


def _public(config: ServeConfig) -> ServeConfig:
    """With a model name that is no path."""
    path = Path(config.model.id).expanduser()
    if config.model_name is None and path.exists():
        return config.model_copy(update={"model_name": path.name})
    return config


def make_server(config: ServeConfig, load: Callable[[], Discoverer]) -> uvicorn.Server:
    """The server of one process, around one discoverer, which is loaded now."""
    app, http = make_app(config, load), connections.protocol(config.limits)
    return uvicorn.Server(uvicorn.Config(app, host=config.host, port=config.port, http=http, log_level="warning"))


def deploy(config: ServeConfig) -> Any:
    """The application as a Ray Serve deployment, for `serve.run`; every replica loads the model."""
    from ray import serve

    planned = plan_of(config)  # every replica is the same, also one that starts days later

    def build() -> FastAPI:
        return make_app(config, partial(open_discoverer, config, planned))

    @serve.deployment(num_replicas=config.replicas, ray_actor_options={"num_cpus": config.threads})
    @serve.ingress(build)
    class Replica:
        pass

    bind: Any = getattr(Replica, "bind")  # noqa: B009  # the decorator's type hides it
    return bind()


def job(config: ServeConfig) -> int:
    """Serve until interrupted."""
    config = _public(config)
    if config.replicas > 1:
        from ray import serve

        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(deploy(config), blocking=True)
        return command.DONE
    with suppress(KeyboardInterrupt):
        make_server(config, partial(open_discoverer, config)).run()
    return command.DONE


def main() -> None:
    """`sae-census serve`: take overrides from the command line, and answer until it is stopped."""
    command.main("serve", ServeConfig, job)
