"""What README and docs show runs as it stands there; they name every job and every module that there is."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sae_census.cli import JOBS
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.census.analyze import analyze

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOME = "runs/catalogs/demo/000001"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory, analyze_config: Callable[..., Any]) -> Catalog:
    # readers that see a column in a folder named key=value would read these instead of the table's own
    root = tmp_path_factory.mktemp("readme") / "layer=12" / "sae=x" / "feature_id=7"
    return analyze(analyze_config(root, catalog={"name": "demo"})).catalog


def blocks(language: str, *pages: str) -> list[str]:
    texts = [README, *((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)]
    found = [re.findall(rf"```{language}\n(.*?)```", text, re.S) for text in texts]
    assert all(found)
    return [block for page in found for block in page]


@pytest.mark.parametrize("query", blocks("sql", "catalog.md"), ids=lambda query: query.splitlines()[0][:60])
def test_every_query_runs(query: str, catalog: Catalog) -> None:
    assert HOME in query
    query = query.replace(HOME, str(catalog.folder))
    query = query.replace("'resid_post_15'", "'late'").replace("'code'", "'notes'")
    rows = duckdb.sql(query).fetchall()
    assert rows
    assert not any("x" in row for row in rows), "no folder is a column"


def test_every_query_on_paper_takes_no_folder_for_a_column() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for query in re.findall(r"```sql\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            assert query.count(".parquet'") == query.count("hive_partitioning=false"), page.name


def test_the_python_lines_run(catalog: Catalog) -> None:
    (code,) = blocks("python")
    root = catalog.folder.parents[2]
    code = code.replace('"runs"', repr(str(root))).replace("resid_post_15", "late").replace("blocks.15", "blocks.1")
    exec(code, {})


def test_every_job_is_in_the_table_of_jobs() -> None:
    for job in JOBS:
        assert f"`sae-census {job}" in README


def test_the_tree_of_modules_is_the_one_that_is_there() -> None:
    made = subprocess.run([ROOT / "scripts/tree"], capture_output=True, text=True, check=True).stdout
    assert made in (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), "run scripts/tree"
    for line in made.splitlines():
        assert len(line.split()) > 3, f"a module without a caption: {line}"


def test_every_link_of_a_page_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_module_that_a_page_names_is_there() -> None:
    package = ROOT / "pipeline/sae_census"
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name in re.findall(r"`([\w/]+\.py)", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or (package / name).exists(), f"{page.name}: {name}"
