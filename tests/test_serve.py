"""The HTTP server: what its schema promises, errors that tell a field and no secret, and load."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from conftest import MakeConfig
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from jobs.serve import make_app
from pipeline.config import DiscoverRequest, ServeConfig
from pipeline.findings import Discovery
from pipeline.flows.analyze import analyze
from pipeline.flows.catalog import Catalog
from pipeline.flows.discover import open_discoverer
from pipeline.steps.discoverer import Discoverer

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


def test_every_operation_is_tried(schema):
    assert {(o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_server_keeps_the_promises_of_its_schema(method, path, mode, schema):
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query or operation.path_parameters):
        return

    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def keeps(case: Any) -> None:
        answer = case.call(headers={"Authorization": "Bearer long enough"})
        case.validate_response(answer, checks=ALL_CHECKS)
        if mode is GenerationMode.POSITIVE and answer.status_code == 422:
            (problem,) = answer.json()["errors"]
            assert problem["field"] in LOADED_DECIDES, answer.text
            assert "expected either prompt or text" not in problem["message"]

    keeps()
