"""The README's queries run as they stand there, and it names every job and script there is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from pipeline.flows.analyze import analyze
from pipeline.flows.catalog import Catalog

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = "runs/catalogs/demo/000001"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., Any]) -> Catalog:
    return analyze(analyze_config(tmp_path_factory.mktemp("readme"), catalog={"name": "demo"})).catalog


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    assert found
    return found


@pytest.mark.parametrize("query", blocks("sql"), ids=lambda query: query.splitlines()[0][:60])
def test_every_query_runs(query: str, catalog: Catalog) -> None:
    assert HOME in query
    query = query.replace(HOME, str(catalog.folder))
    query = query.replace("'resid_post_15'", "'late'").replace("'code'", "'notes'")
    assert duckdb.sql(query).fetchall()


def test_the_python_lines_run(catalog: Catalog) -> None:
    (code,) = blocks("python")
    root = catalog.folder.parents[2]
    code = code.replace('"runs"', repr(str(root))).replace("resid_post_15", "late").replace("blocks.15", "blocks.1")
    exec(code, {})


def test_every_job_is_in_the_table_of_jobs() -> None:
    for path in (ROOT / "jobs").glob("[a-z]*.py"):
        assert f"`jobs.{path.stem}" in README
