"""The HTTP server: what its schema promises, errors that tell a field and no secret, and load."""

import asyncio
import http.client
import json
import math
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
import uvicorn
from conftest import MakeConfig
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from sae_census.cli.serve import make_app, make_server
from sae_census.config import DiscoverRequest, ServeConfig
from sae_census.findings import Discovery
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze
from sae_census.flows.discovery.discover import open_discoverer
from sae_census.io.model.generation import Patience
from sae_census.steps.discovery.discoverer import Discoverer

URL = "/v1/sae/features/discover"
HOME = "http://127.0.0.1"
JSON = {"content-type": "application/json"}
ASKED: dict[str, Any] = {"text": "river water stone", "min_coverage_pct": 0.0, "return_top_x": 5}


@pytest.fixture(scope="module")
def config(model_dir: Path, sae_dirs: dict[str, Path], analyze_config: MakeConfig, tmp_path_factory) -> ServeConfig:
    root = tmp_path_factory.mktemp("served")
    analyze(analyze_config(root))
    return ServeConfig.model_validate(
        {
            "model": {"id": str(model_dir), "dtype": "float32", "device": "cpu"},
            "model_name": "tiny",
            "saes": [{"path": str(path)} for path in sae_dirs.values()],
            "store": {"root": str(root)},
            "threads": 1,
            "cache_mb": 0,
        }
    )


@pytest.fixture(scope="module")
def discoverer(config: ServeConfig) -> Discoverer:
    return open_discoverer(config)


@pytest.fixture(scope="module")
def app(config: ServeConfig, discoverer: Discoverer) -> FastAPI:
    return make_app(config, lambda: discoverer)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url=HOME, raise_server_exceptions=False) as one:
        yield one


def limited(config: ServeConfig, discoverer: Any, **limits: Any) -> TestClient:
    changed = ServeConfig.model_validate(config.model_dump() | {"limits": limits})
    return TestClient(make_app(changed, lambda: discoverer), base_url=HOME, raise_server_exceptions=False)


def assert_problem(answer: httpx.Response, code: int, field: str | None, config: ServeConfig) -> str:
    """An error of the one shape, without a path or a traceback; its message."""
    assert answer.status_code == code, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"errors"}
    assert all(set(error) == {"field", "message"} for error in body["errors"])
    assert body["errors"][0]["field"] == field
    for secret in ("Traceback", "File ", config.model.id, config.store.root, ".py", "/tmp/", "/work"):
        assert secret not in answer.text
    return str(body["errors"][0]["message"])


# --- discovery ---


def test_an_answer_is_that_of_the_discoverer(client, discoverer):
    answer = client.post(URL, json=ASKED)
    assert answer.status_code == 200
    assert Discovery.model_validate_json(answer.text) == discoverer.discover(DiscoverRequest(**ASKED))
    assert answer.json()["model_id"] == "tiny"


def test_a_prompt_is_continued(client):
    body = {"prompt": "river", "gen_tokens": 6, "min_coverage": 0.0, "seed": 3, "do_sample": True}
    first, second = client.post(URL, json=body), client.post(URL, json=body)
    assert first.json()["analyzed"]["mode"] == "prompt+gen"
    assert first.content == second.content


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ({}, 422, "prompt"), ({"text": "a", "prompt": "b"}, 422, "prompt"), ([1], 422, "prompt"),
        ({"text": 5}, 422, "text"), ({"text": ""}, 422, "text"), ({"text": "a", "lauers": [1]}, 422, "lauers"),
        ({"text": "a", "gen_tokens": "5"}, 422, "gen_tokens"), ({"text": "a", "generate": "true"}, 422, "generate"),
        ({"text": "a", "layers": [0, "x"]}, 422, "layers.1"), ({"text": "a", "tau": {"mode": "x"}}, 422, "tau.mode"),
        ({"text": "a", "layers": [5]}, 422, "layers"), ({"text": "a", "streams": ["mlp_out"]}, 422, "streams"),
        ({"text": "a", "restrict_features": [96]}, 422, "restrict_features"),
        ({"text": "a", "normalize": "mean_code"}, 422, "normalize"),
        ({"prompt": "a", "chat_template": True}, 422, "chat_template"),
        ({"prompt": "a", "gen_tokens": 600}, 422, "gen_tokens"), ({"prompt": "a" * 70, "gen_tokens": 4}, 422, "prompt"),
        ({"text": "a" * 70}, 422, "text"), ({"text": "a", "min_coverage_pct": 50}, 422, "min_coverage_pct"),
        ({"text": "a", "model_id": "another"}, 404, "model_id"), ({"text": "a", "sae_id": "another"}, 404, "sae_id"),
        ({"text": "a", "model_id": "../../etc/passwd"}, 404, "model_id"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_names_its_field(body, code, field, client, config):
    assert_problem(client.post(URL, json=body), code, field, config)


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"", 422, "prompt"), (b"{", 400, None), (b"nonsense", 400, None), (b'{"text": "\xff"}', 400, None),
        (b"[" * 100_000, 400, None), (b'{"text":"a","seed":' + b"9" * 5000 + b"}", 400, None),
        (rb'{"text": "\ud800"}', 422, "text"), (rb'{"text": "a", "model_id": "\ud800"}', 422, "model_id"),
        (rb'{"text": "a", "sae_id": "\ud800"}', 422, "sae_id"),
        (rb'{"text": "a", "streams": ["\ud800"]}', 422, "streams.0"),
        (b'{"text": "a", "min_coverage_pct": NaN}', 422, "min_coverage_pct"),
        (b'{"text": "a", "temperature": 1e999}', 422, "temperature"), (b'{"text": "a", "top_p": NaN}', 422, "top_p"),
        (b'{"text": "a", "max_norm_ratio": Infinity}', 422, "max_norm_ratio"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_or_no_text(body, code, field, client, config):
    assert_problem(client.post(URL, content=body, headers=JSON), code, field, config)


def test_other_methods_and_places(client, config):
    assert_problem(client.get(URL), 405, None, config)
    assert_problem(client.post("/v1/health"), 405, None, config)
    assert_problem(client.get("/nothing/here"), 404, None, config)


@pytest.mark.parametrize("told", [True, False], ids=["content-length", "chunked"])
def test_a_large_body_is_refused(told, config, discoverer):
    client = limited(config, discoverer, body_bytes=1000)
    body = json.dumps(ASKED | {"text": "a" * 2000}).encode()

    def chunks() -> Iterator[bytes]:
        yield from (body[i : i + 100] for i in range(0, len(body), 100))

    answer = client.post(URL, content=body if told else chunks(), headers=JSON)
    assert_problem(answer, 413, None, config)
    small = json.dumps(ASKED).encode()
    fitting = client.post(URL, content=small if told else iter([small[:9], small[9:]]), headers=JSON)
    assert fitting.status_code == 200


def test_a_body_is_refused_before_it_is_whole(config, discoverer):
    """No more is read than what proves that the body is too large."""
    app = make_app(
        ServeConfig.model_validate(config.model_dump() | {"limits": {"body_bytes": 1000}}), lambda: discoverer
    )
    taken, sent = [], []

    async def receive() -> dict[str, Any]:
        taken.append(1)
        assert len(taken) < 20, "goes on reading"
        return {"type": "http.request", "body": b"a" * 100, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": URL,
        "raw_path": URL.encode(), "query_string": b"", "headers": [(b"host", b"127.0.0.1")], "scheme": "http",
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"], len(taken)) == (413, 11)


def test_a_slow_generation_is_given_up(config, discoverer):
    answer = limited(config, discoverer, seconds=1e-6).post(URL, json={"prompt": "river", "gen_tokens": 40})
    assert_problem(answer, 504, "gen_tokens", config)


@pytest.mark.parametrize("way", [("[", "]"), ('{"a":', "}"), ("[", ""), ('[{"mode":', "}]")], ids="".join)
def test_nested_json_is_refused_however_deep_it_is(way, client):
    places = (
        "%s",
        '{"text": %s}',
        '{"text": "a", "layers": %s}',
        '{"text": "a", "tau": %s}',
        '{"text": "a", "no": %s}',
    )
    for depth in (3, 480, 700, 900, 990, 2000, 90_000):
        for around in places:
            body = around % (way[0] * depth + ("1" if way[1] else "") + way[1] * depth)
            assert client.post(URL, content=body, headers=JSON).status_code in (400, 422), (depth, around)


class Failing:
    """A discoverer with a fault that knows a secret."""

    model_id = "tiny"

    def describe(self) -> list[dict[str, Any]]:
        return []

    def discover(self, *_: Any) -> Discovery:
        raise RuntimeError(f"{Path(__file__)}: hunter2")


def test_a_fault_of_ours_is_told_by_a_number_only(config, capsys):
    answer = limited(config, Failing()).post(URL, json=ASKED)
    message = assert_problem(answer, 500, None, config)
    assert "hunter2" not in answer.text
    log = capsys.readouterr().err
    assert "hunter2" in log
    assert message.split()[-1] in log


class Waiting(Failing):
    """Holds every request until it is let go."""

    def __init__(self, inner: Discoverer):
        self.inner, self.go, self.begun = inner, threading.Event(), threading.Event()

    def discover(self, *args: Any) -> Discovery:
        self.begun.set()
        assert self.go.wait(60)
        return self.inner.discover(*args)


def test_too_many_requests_are_told_to_come_back(config, discoverer):
    waiting = Waiting(discoverer)
    with limited(config, waiting, concurrent=2) as client, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(client.post, URL, json=ASKED) for _ in range(2)]
        assert waiting.begun.wait(60)
        threading.Event().wait(1)  # both are in the queue
        answer = client.post(URL, json=ASKED)
        try:
            assert_problem(answer, 429, None, config)
            assert int(answer.headers["retry-after"]) > 0
            assert client.get("/v1/health").status_code == 200
        finally:
            waiting.go.set()
        assert [one.result().status_code for one in held] == [200, 200]
        assert client.post(URL, json=ASKED).status_code == 200, "there is room again"


def test_many_at_once_get_the_answers_that_they_would_get_alone(app, client):
    words = ["river", "water", "stone", "bridge", "return", "café", "🙂", "list"]
    bodies: list[dict[str, Any]] = []
    for n in range(64):
        text = " ".join(words[i % 8] for i in range(n, n + 2 + n % 5))
        kind: dict[str, Any] = {"text": text} if n % 3 else {"prompt": text, "gen_tokens": 4, "do_sample": n % 2 == 0}
        bodies.append(kind | {"min_coverage_pct": 0.0, "return_top_x": 1 + n % 7, "topk_tokens_per_seq": 4, "seed": n})
    alone = [client.post(URL, json=body).content for body in bodies]

    async def together() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=HOME, timeout=120) as one:
            return await asyncio.gather(*(one.post(URL, json=body) for body in bodies))

    answers = asyncio.run(together())
    assert {answer.status_code for answer in answers} == {200}
    assert [answer.content for answer in answers] == alone
    assert len(set(alone)) > 50


# --- connections ---


@dataclass(frozen=True)
class Listening:
    """A server on loopback; called, it gives a connection on which something was said."""

    server: uvicorn.Server
    place: Any

    def __call__(self, words: bytes) -> socket.socket:
        one = socket.create_connection(self.place, timeout=60)
        one.sendall(words)
        return one

    def wait_until_busy(self, num_connections: int) -> None:
        while sum(one.is_busy for one in list(self.server.server_state.connections)) < num_connections:
            threading.Event().wait(0.01)


@contextmanager
def listening(config: ServeConfig, discoverer: Any, **limits: Any) -> Iterator[Listening]:
    server = make_server(ServeConfig.model_validate(config.model_dump() | {"limits": limits}), lambda: discoverer)
    place = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield Listening(server, place.getsockname())
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def answer_on(one: socket.socket) -> tuple[int, bytes]:
    """Status and body; 0 if it was closed without a word."""
    with closing(http.client.HTTPResponse(one)) as answer:
        try:
            answer.begin()
        except (http.client.RemoteDisconnected, ConnectionResetError):
            return 0, b""
        return answer.status, answer.read()


HEAD = b"Host: 127.0.0.1\r\n"
HEALTH = b"GET /v1/health HTTP/1.1\r\n" + HEAD + b"\r\n"
BODY = json.dumps(ASKED).encode()
POST = f"POST {URL} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n".encode() + HEAD
HALVES = [b"", b"GET /v1/he", HEALTH[:-2], POST + b"\r\n", POST + b"\r\n" + BODY[:9], HEALTH + b"GET /v1/he"]


@pytest.mark.parametrize("half", HALVES, ids=range(len(HALVES)))
def test_a_request_that_does_not_come_in_time_ends_its_connection(half, config):
    with listening(config, Failing(), read_seconds=0.3) as say, say(half) as one:
        one.settimeout(60)
        rest = b"".join(iter(lambda: one.recv(1 << 16), b""))
    assert rest.count(b"HTTP/1.1 ") == (1 if half.startswith((HEALTH, POST)) else 0)
    assert (b"408 Request Timeout" in rest) == half.startswith(POST)


def test_a_byte_now_and_then_does_not_keep_a_connection(config):
    with listening(config, Failing(), read_seconds=0.3) as say, say(b"GET /v1/health HTTP/1.1\r\n") as one:
        one.settimeout(0.01)
        is_open = True
        while is_open:  # for ever, if it were kept
            try:
                one.sendall(b"a")
                is_open = one.recv(1) != b""
            except TimeoutError:
                pass
            except ConnectionError:
                is_open = False


def test_half_open_connections_lock_nobody_out(config):
    """Those that hold a place without asking make room, the oldest first, long before their time is over."""
    with listening(config, Failing(), connections=3, read_seconds=3600) as say, ExitStack() as stack:
        held = [stack.enter_context(say(half)) for half in HALVES[:3] * 4]
        for _ in range(2):
            with say(HEALTH) as one:
                assert answer_on(one)[0] == 200
        assert [answer_on(one)[0] for one in held[:-3]] == [0] * (len(held) - 3)


def test_where_all_connections_are_busy_a_further_one_is_told_to_come_back(config, discoverer):
    waiting = Waiting(discoverer)
    ask = POST + b"\r\n" + BODY
    with listening(config, waiting, connections=2) as say, say(ask) as first, say(ask) as second:
        try:
            say.wait_until_busy(2)
            with say(HEALTH) as third:
                status, body = answer_on(third)
        finally:
            waiting.go.set()
        assert (status, json.loads(body)["errors"][0]["message"]) == (503, "all connections are busy")
        assert [answer_on(one)[0] for one in (first, second)] == [200, 200]


class Endless(Waiting):
    """Works on a request until nobody waits for it."""

    def __init__(self, inner: Discoverer):
        super().__init__(inner)
        self.ended = threading.Event()

    def discover(self, request: DiscoverRequest, patience: Patience) -> Discovery:
        if request.seed:
            return self.inner.discover(request, patience)
        self.begun.set()
        assert patience.gone.wait(60)
        self.ended.set()
        patience.check()
        raise AssertionError


def test_a_client_that_hangs_up_ends_its_own_work_and_no_other(config, discoverer):
    endless = Endless(discoverer)
    body = json.dumps(ASKED | {"seed": 0}).encode()
    ask = POST.replace(str(len(BODY)).encode(), str(len(body)).encode()) + b"\r\n" + body
    with listening(config, endless) as say, say(POST + b"\r\n" + BODY) as other:
        assert answer_on(other)[0] == 200
        leaving = say(ask)
        assert endless.begun.wait(60)
        with say(POST + b"\r\n" + BODY) as waits:
            leaving.close()
            assert endless.ended.wait(60)
            assert answer_on(waits)[0] == 200


# --- who may ask ---


def test_a_token_guards_all_but_health(config, discoverer):
    guarded = ServeConfig.model_validate(config.model_dump() | {"token": "long enough", "host": "0.0.0.0"})
    client = TestClient(
        make_app(guarded, lambda: discoverer), base_url="http://anywhere", raise_server_exceptions=False
    )
    for method, url in (("POST", URL), ("GET", "/v1/catalogs"), ("GET", "/v1/catalogs/default/features"),
                        ("GET", "/v1/catalogs/default/search?q=a"),
                        ("GET", "/v1/catalogs/default/features/blocks.0.hook_resid_post/early/3")):  # fmt: skip
        body = {"json": ASKED} if method == "POST" else {}
        for header in (
            None,
            "Bearer wrong",
            "Bearer long enough ",
            "Basic long enough",
            "long enough",
            "Bearer",
            "\xff",
        ):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            answer = client.request(method, url, headers=headers, **body)
            if header == "Bearer long enough ":  # white space around a header is no part of it
                assert answer.status_code in (200, 401)
                continue
            assert_problem(answer, 401, None, config)
            assert answer.headers["www-authenticate"] == "Bearer"
        right = client.request(method, url, headers={"Authorization": "Bearer long enough"}, **body)
        assert right.status_code == 200
    assert client.get("/v1/health").status_code == 200


def test_beyond_loopback_a_token_is_a_must():
    for host in ("0.0.0.0", "::", "192.168.1.2"):
        with pytest.raises(ValidationError, match="set token"):
            ServeConfig(host=host)
    with pytest.raises(ValidationError):
        ServeConfig(host="0.0.0.0", token="short")
    assert ServeConfig(host="::1").host == "::1"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:80", "[::1]", "[::1]:8000"])
def test_loopback_names_are_answered(host, client):
    assert client.get("/v1/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80"])
def test_other_names_are_refused(host, client, config):
    assert_problem(client.get("/v1/health", headers={"host": host}), 400, None, config)


# --- catalogs ---


def test_what_is_loaded_and_what_is_stored(client, config):
    health = client.get("/v1/health").json()
    assert health["model_id"] == "tiny"
    assert {sae["sae_id"]: (sae["layer"], sae["num_features"]) for sae in health["saes"]} == {
        "early": (0, 64), "late": (1, 96),
    }  # fmt: skip
    (listed,) = client.get("/v1/catalogs").json()
    catalog = Catalog(config.store.root)
    assert (listed["name"], listed["snapshot"], listed["digest"]) == ("default", 1, catalog.digest)
    assert listed["saes"] == catalog.saes


def test_pages_of_features_join_to_all_of_them(client, config):
    rows: list[dict[str, Any]] = []
    while page := client.get("/v1/catalogs/default/features", params={"start": len(rows), "limit": 37}).json():
        rows += page
    catalog = Catalog(config.store.root)
    expected = catalog.features.to_pylist()
    expected.sort(key=lambda row: (row["rank"], row["hook_point"], row["sae"]))
    assert rows == json.loads(json.dumps(expected))
    one = client.get("/v1/catalogs/default/features", params={"sae": "late", "limit": 500}).json()
    assert one == [row for row in rows if row["sae"] == "late"]
    assert client.get("/v1/catalogs/default/features", params={"hook_point": "none"}).json() == []
    assert len(client.get("/v1/catalogs/default/features").json()) == 50


def test_a_feature_by_its_key(client, config):
    catalog = Catalog(config.store.root)
    row = catalog.features.to_pylist()[3]
    key = f"{row['hook_point']}/{row['sae']}/{row['feature_id']}"
    found = client.get(f"/v1/catalogs/default/features/{key}").json()
    spans = found.pop("spans")
    assert found == json.loads(json.dumps(row))
    assert spans == json.loads(json.dumps(catalog.spans(row["hook_point"], row["sae"], row["feature_id"]).to_pylist()))
    assert spans


@pytest.mark.parametrize(
    "key",
    ["blocks.0.hook_resid_post/early/64", "blocks.0.hook_resid_post/late/1", "early/1", "1", "", "a/b/-1", "a/b/x",
     "a/b/9999999999", "blocks.0.hook_resid_post/early/%D9%A3", "blocks.0.hook_resid_post/early/3/", "%00/%00/0",
     "../../../etc/passwd/0"],
)  # fmt: skip
def test_a_feature_that_is_not_there(key, client, config):
    answer = client.get(f"/v1/catalogs/default/features/{key}")
    if answer.status_code != 404 or answer.json()["errors"][0]["field"] is not None:
        assert_problem(answer, 404, "key", config)


@pytest.mark.parametrize(
    "name", ["nothing", "..", "...", "%2e%2e", "..%2f..%2fetc", "default%00", "default%0A", "a" * 300, ".hidden", "*"]
)
def test_a_catalog_that_is_not_there(name, client, config):
    for rest in ("features", "search?q=a", "features/a/b/1"):
        answer = client.get(f"/v1/catalogs/{name}/{rest}")
        assert answer.status_code in (404, 422)
        assert_problem(answer, answer.status_code, answer.json()["errors"][0]["field"], config)


def test_search_finds_peaks(client, config):
    catalog = Catalog(config.store.root)
    for text in ("ri", "RI", "é", "🙂", "no such token"):
        found = client.get("/v1/catalogs/default/search", params={"q": text, "limit": 500}).json()
        expected = set()
        for row in catalog.features.to_pylist():
            key = row["hook_point"], row["sae"], row["feature_id"]
            for span in catalog.spans(*key, groups=["top"]).to_pylist():
                if text.casefold() in span["tokens"][span["position"] - span["start"]].casefold():
                    expected.add(key)
        assert {(row["hook_point"], row["sae"], row["feature_id"]) for row in found if row["num_spans"]} == expected
        counts = [row["num_spans"] for row in found if not row["in_label"]]
        assert counts == sorted(counts, reverse=True)
    assert (
        client.get("/v1/catalogs/default/search", params={"q": "ri", "limit": 2}).json()
        == (client.get("/v1/catalogs/default/search", params={"q": "ri"}).json()[:2])
    )


@pytest.mark.parametrize(
    ("url", "field"),
    [("features?limit=0", "limit"), ("features?limit=501", "limit"), ("features?start=-1", "start"),
     ("features?start=x", "start"), ("search", "q"), ("search?q=", "q"), ("search?q=" + "a" * 201, "q"),
     ("features?start=1099511627776", "start")],
)  # fmt: skip
def test_a_bad_query_names_its_field(url, field, client, config):
    assert_problem(client.get(f"/v1/catalogs/default/{url}"), 422, field, config)


# --- the schema ---

load_all_checks()
ALL_CHECKS = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]
LOADED_DECIDES = {
    "layers", "streams", "restrict_features", "gen_tokens", "text", "prompt", "chat_template", "normalize",
}  # fmt: skip
"""Fields of which the schema cannot know what model, SAEs and catalog are loaded."""


OPERATIONS = [
    ("POST", URL), ("GET", "/v1/health"), ("GET", "/v1/catalogs"), ("GET", "/v1/catalogs/{name}/features"),
    ("GET", "/v1/catalogs/{name}/features/{key}"), ("GET", "/v1/catalogs/{name}/search"), ("GET", "/v1/status"),
]  # fmt: skip


@pytest.fixture(scope="module")
def schema(config: ServeConfig, discoverer: Discoverer) -> Any:
    """Of a server with a token, so that what is said of tokens is tried, too."""
    fields = config.model_dump() | {"token": "long enough", "host": "0.0.0.0"}
    return schemathesis.openapi.from_asgi(
        "/openapi.json", make_app(ServeConfig.model_validate(fields), lambda: discoverer)
    )


def test_the_page_of_all_routes_needs_no_other_server(client):
    needs = re.findall(r'(?:src|href)="([^"]+)"', client.get("/docs").text)
    assert len(needs) == 3  # script, style, icon
    assert [client.get(url).status_code for url in needs if url.startswith("/")] == [200] * len(needs)


@pytest.mark.parametrize("field", ["first_positions", "seed", "top_p"])
def test_a_whole_number_is_one_however_it_is_written(field, client):
    """As JSON Schema has it: 1.0 is an integer."""
    whole, broken = (client.post(URL, json={"text": "river", field: value}) for value in (1.0, 1.5))
    assert (whole.status_code, broken.status_code) == (200, 422)


@pytest.mark.parametrize("path", ["catalogs/x/features?lmit=3", "catalogs/x/search?q=a&lmit=3", "status?lmit=3"])
def test_a_parameter_that_is_none_is_refused_by_its_name(path, client, config):
    assert_problem(client.get(f"/v1/{path}"), 422, "lmit", config)


def test_the_greatest_norm_ratio_makes_no_token_an_outlier(client):
    every, most = (
        client.post(URL, json={"text": "river water", **masks}).json() for masks in ({}, {"max_norm_ratio": 1e308})
    )
    assert most["analyzed"]["tokens_kept"] == every["analyzed"]["tokens_kept"]


def test_the_schema_asks_for_a_token_only_where_one_is_set(app, schema):
    assert "security" not in json.dumps(app.openapi())
    paths = schema.raw_schema["paths"]
    assert {url for url, ways in paths.items() if "security" not in next(iter(ways.values()))} == {"/v1/health"}


Edge = tuple[tuple[str, ...], Any, Any]
"""Where in a body or among parameters, what is just inside, and what is just beyond."""


def edges(schema: dict[str, Any], document: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[Edge]:
    """Every bound of a value that a schema tells of."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    parts = [(at, one) for one in schema.get("anyOf", [])]
    for where, inner in [*parts, *(((*at, name), one) for name, one in schema.get("properties", {}).items())]:
        yield from edges(inner, document, where)
    item: Any = "a"
    if "items" in schema:
        items = list(edges(schema["items"], document, at))
        item = [items[0][1]]
        yield from ((at, [inside], [beyond]) for _, inside, beyond in items)
    for name, far in (("minItems", -1), ("maxItems", 1), ("minLength", -1), ("maxLength", 1)):
        if name in schema:
            yield at, item * schema[name], item * (schema[name] + far)
    for name, way in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", -1), ("exclusiveMaximum", 1)):
        if name in schema:
            yield at, *_around(schema["type"] == "integer", schema[name], way, is_in=not name.startswith("exclusive"))
    if "enum" in schema:
        yield at, schema["enum"][0], "no such word"
    if "pattern" in schema:
        yield at, "a.b-c_9", "a b"


def _around(is_whole: bool, bound: float, way: int, *, is_in: bool) -> tuple[float, float]:
    """The last number inside a bound and the first beyond."""
    back, further = (bound + w if is_whole else math.nextafter(bound, w * math.inf) for w in (-way, way))
    return (bound, further) if is_in else (back, bound)


def nested(at: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {at[0]: value if len(at) == 1 else nested(at[1:], value)}


class Answering(Failing):
    """Has one answer to everything, so that what is refused is refused for its form."""

    def __init__(self, answer: Discovery):
        self.answer = answer

    def discover(self, *_: Any) -> Discovery:
        return self.answer


def test_a_body_at_a_bound_of_the_document_is_accepted_and_one_beyond_is_refused(config, discoverer):
    client = limited(
        config, Answering(discoverer.discover(DiscoverRequest(**ASKED))), body_bytes=1 << 25, gen_tokens=200
    )
    document = client.get("/openapi.json").json()
    asked = document["components"]["schemas"]["DiscoverRequest"]
    valid = jsonschema.Draft202012Validator(asked | {"components": document["components"]}).is_valid
    quantile = [(("tau",), {"mode": "quantile", "value": inside}, {"mode": "quantile", "value": beyond})
                for inside, beyond in ((5e-324, 0.0), (math.nextafter(1, 0), 1.0))]  # fmt: skip
    found = [*edges(asked, document), *quantile]
    assert len(found) > 40
    for at, inside, beyond in found:
        base: dict[str, Any] = {} if at in (("text",), ("prompt",)) else {"text": "a"}
        base |= {"do_sample": True} if at in (("temperature",), ("top_p",)) else {}
        for value, right in ((inside, True), (beyond, False)):
            body = base | nested(at, value)
            if at == ("tau", "value"):
                body["tau"]["mode"] = "constant"
            text = json.dumps(body).replace("Infinity", "1e309")
            answer = client.post(URL, content=text, headers=JSON)
            assert (valid(body), answer.status_code) == (right, 200 if right else 422), (
                at,
                text[:200],
                answer.text[:200],
            )
    for extra, right in (({}, True), ({"gen_tokens": 200}, True), ({"gen_tokens": 201}, False),
                         ({"gen_tokens": 201, "generate": False}, True)):  # fmt: skip
        body = {"prompt": "a"} | extra
        assert (valid(body), client.post(URL, json=body).status_code) == (right, 200 if right else 422), body
    few = limited(config, discoverer, gen_tokens=100).get("/openapi.json").json()["components"]["schemas"]
    assert few["DiscoverRequest"]["then"]["required"] == ["gen_tokens"], "the default is too many"


def test_a_parameter_at_a_bound_of_the_document_is_accepted_and_one_beyond_is_refused(client):
    document, num_tried = client.get("/openapi.json").json(), 0
    for path, ways in document["paths"].items():
        for parameter in ways.get("get", {}).get("parameters", []):
            for _, inside, beyond in edges(parameter["schema"], document):
                num_tried += 1
                for value, right in ((inside, True), (beyond, False)):
                    given = {"name": "default", "key": "a/b/1", "q": "a"} | {parameter["name"]: str(value)}
                    url = re.sub(r"{(\w+)}", lambda found, given=given: given.pop(found[1]), path)
                    query = {
                        name: text
                        for name, text in given.items()
                        if name == parameter["name"] or ("search" in url and name == "q")
                    }
                    status = client.get(url, params=query).status_code
                    assert (status != 422) == right or status == 404, (url, query, status)
    assert num_tried > 10


def test_bounds_of_integers_are_integers(client):
    """As the server keeps them; a float cannot say 2**63 - 1."""
    document = client.get("/openapi.json").json()
    seen = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("type") == "integer":
                seen.extend(value[name] for name in value if name.lower().endswith("imum"))
            value = list(value.values())
        for inner in value if isinstance(value, list) else []:
            look(inner)

    look(document)
    assert len(seen) > 20
    assert {type(bound) for bound in seen} == {int}
    assert document["components"]["schemas"]["DiscoverRequest"]["properties"]["seed"]["exclusiveMaximum"] == 2**63


def test_every_operation_is_tried(schema):
    assert {(o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_server_keeps_the_promises_of_its_schema(method, path, mode, schema):
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def keeps(case: Any) -> None:
        answer = case.call(headers={"Authorization": "Bearer long enough"})
        case.validate_response(answer, checks=ALL_CHECKS)
        if mode is GenerationMode.POSITIVE and answer.status_code == 422:
            (problem,) = answer.json()["errors"]
            assert problem["field"] in LOADED_DECIDES, answer.text
            assert "expected either prompt or text" not in problem["message"]

    keeps()
