"""Laws of what a corpus.source names: every file is read once, or passed over by name with its reason."""

import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sae_census.cli.plan import describe
from sae_census.config import AnalyzeConfig
from sae_census.errors import SourceError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.plan import make_plan
from sae_census.io.text.corpus import Document, Found, ReadSettings, find_sources, read
from sae_census.io.text.folders import is_dataset

SETTINGS = ReadSettings(
    column="text", split="train", revision=None, streaming=False, txt_documents="file", max_record_bytes=1000
)
CARD = b"---\nlicense: mit\n---\n"


def line(text: str, **others: Any) -> bytes:
    return json.dumps({"text": text, **others}).encode() + b"\n"


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return root


def texts_of(found: Found, settings: ReadSettings = SETTINGS) -> list[str]:
    records = [record for source in found.sources for record in read(source, settings)]
    return sorted(record.text for record in records if isinstance(record, Document))


def books_of(found: Found) -> dict[str, tuple[int, str]]:
    return {one.why: (one.count, one.first) for one in found.passed_over}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the datasets library lies beside the files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --- dots ---------------------------------------------------------------------------------------------------

DOTTED = (
    "a.jsonl", ".a.jsonl", "._a.jsonl", "b/a.jsonl", "b/.a.jsonl", "b/c/a.jsonl",
    ".cache/a.jsonl", ".cache/b/a.jsonl", "b/.ipynb_checkpoints/a-checkpoint.jsonl", ".cache/.a.jsonl",
)  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        "*", "*.jsonl", "**/*.jsonl", "**", "b/**", "*/*", "*/*.jsonl", "**/b/*.jsonl", "**/**/a.jsonl", "?a.jsonl",
        "[.]a.jsonl", ".*", ".*/*", "**/.*", "**/.*.jsonl", ".cache/*", "**/.cache/*", ".cache/**",
        "**/.cache/**/*.jsonl", "**/.ipynb_checkpoints/*", "b**/*.jsonl", "./**/*.jsonl",
    ],
)  # fmt: skip
def test_a_wildcard_matches_no_dot_as_in_a_shell_and_what_it_passes_over_is_counted(
    tmp_path: Path, pattern: str
) -> None:
    tree(tmp_path, {name: line(name) for name in DOTTED})

    def twin(*, hidden: bool) -> set[Path]:
        named = glob(str(tmp_path / pattern), recursive=True, include_hidden=hidden)  # noqa: PTH207  # Path's knows no dots
        return {path.resolve() for path in map(Path, named) if path.is_file()}

    expected, skipped = twin(hidden=False), twin(hidden=True) - twin(hidden=False)
    if not expected:
        told = f"matches no file; .*{len(skipped)} file.* begins with a dot" if skipped else "matches no file"
        with pytest.raises(SourceError, match=told):
            find_sources(str(tmp_path / pattern), SETTINGS)
        return
    found = find_sources(str(tmp_path / pattern), SETTINGS)
    assert {Path(path).resolve() for source in found.sources for path in source.paths} == expected
    assert books_of(found).get("dot", (0,))[0] == len(skipped)


def test_a_copy_that_a_notebook_left_is_not_read_and_named(tmp_path: Path) -> None:
    tree(tmp_path, {"a.jsonl": line("A"), ".ipynb_checkpoints/a.jsonl": line("A"), "._a.jsonl": b"\0\5\26\7"})
    for source in (str(tmp_path), str(tmp_path / "**" / "*.jsonl")):
        found = find_sources(source, SETTINGS)
        assert texts_of(found) == ["A"]
        (book,) = found.passed_over
        assert str(book) == (
            f"corpus.source {source}: 2 files are not read, because a name begins with a dot; a pattern that names the "
            "dot reads such files (the first: ._a.jsonl)"
        )


def test_links_to_folders_are_not_followed_by_two_stars_and_named(tmp_path: Path) -> None:
    tree(tmp_path, {"data/a.jsonl": line("A"), "data/deep/b.jsonl": line("B"), "away/c.jsonl": line("C")})
    (tmp_path / "data" / "deep" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "self").symlink_to("self")
    for source in (tmp_path / "data", tmp_path / "data" / "**"):
        found = find_sources(str(source), SETTINGS)
        assert texts_of(found) == ["A", "B"]
        assert books_of(found) == {"linked_folder": (2, "deep/loop"), "dead_link": (2, "gone.jsonl")}
    found = find_sources([str(tmp_path / "data"), str(tmp_path / "data" / "linked")], SETTINGS)
    assert texts_of(found) == ["A", "B", "C"]
    found = find_sources(str(tmp_path / "data" / "*" / "*.jsonl"), SETTINGS)
    assert texts_of(found) == ["B", "C"], "one star goes where it is led"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"a.jsonl": line("A"), "closed/b.jsonl": line("B")})
    (tmp_path / "closed").chmod(0)
    with pytest.raises(SourceError, match=r"the folder .*closed cannot be listed: Permission denied"):
        find_sources(str(tmp_path), SETTINGS)
    (tmp_path / "closed").chmod(0o700)


# --- names --------------------------------------------------------------------------------------------------


def test_a_name_with_brackets_that_exists_is_that_file_or_folder(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            "a[1].jsonl": line("A"),
            "a1.jsonl": line("no"),
            "d[2]/x.jsonl": line("D"),
            "d2/x.jsonl": line("no"),
        },
    )
    assert texts_of(find_sources(str(tmp_path / "a[1].jsonl"), SETTINGS)) == ["A"]
    found = find_sources([str(tmp_path / "d[2]" / "*.jsonl"), str(tmp_path / "d[2]")], SETTINGS)
    assert [source.names for source in found.sources] == [("x.jsonl",)]
    assert texts_of(found) == ["D"]
    (tmp_path / "a[1].jsonl").unlink()
    assert texts_of(find_sources(str(tmp_path / "a[1].jsonl"), SETTINGS)) == ["no"]


def test_files_that_several_patterns_name_are_counted_once_and_told(tmp_path: Path) -> None:
    tree(tmp_path, {"a.jsonl": line("A"), "b/c.jsonl": line("C"), "b/d.jsonl": line("D")})
    found = find_sources([str(tmp_path / "*.jsonl"), str(tmp_path / "b"), str(tmp_path / "**" / "*")], SETTINGS)
    assert texts_of(found) == ["A", "C", "D"]
    assert books_of(found) == {"twice": (3, "a.jsonl")}
    found = find_sources({"all": str(tmp_path), "b": str(tmp_path / "b")}, SETTINGS)
    assert texts_of(found) == ["A", "C", "C", "D", "D"]
    assert books_of(found) == {"several_slices": (2, "b/c.jsonl")}


def test_a_url_with_a_query_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("SAE_CENSUS_CACHE", str(tmp_path / "cache"))
    with fsspec.open("memory://host/a.jsonl?download=true&x=/b.txt", "wb") as file:
        file.write(line("A"))
    found = find_sources("memory://host/a.jsonl?download=true&x=/b.txt", SETTINGS)
    assert [source.names for source in found.sources] == [("a.jsonl",)]
    for url in ("memory://host/get?file=a.jsonl", "memory://host/"):
        with pytest.raises(SourceError, match=r"names no file of a known format; expected \.jsonl"):
            find_sources(url, SETTINGS)


@pytest.mark.parametrize("part", ["", " ", "absent.JSONL", "absent.jsonl.GZ"])
def test_a_name_of_nothing_is_no_dataset(part: str) -> None:
    with pytest.raises(SourceError, match=r"is an empty name|does not exist"):
        find_sources(part, SETTINGS)


def test_a_mark_of_byte_order_changes_no_json(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    tree(
        tmp_path,
        {
            "a.json": mark + b'[{"text": "A"}]',
            "b.json": mark + line("B") + line("C"),
            "d.json": mark + line("D"),
        },
    )
    assert texts_of(find_sources(str(tmp_path), SETTINGS)) == ["A", "B", "C", "D"]
    tree(tmp_path, {"cut.json": mark + b'[{"text": "A"}, {"te'})
    with pytest.raises(SourceError, match="damaged JSON array"):
        texts_of(find_sources(str(tmp_path / "cut.json"), SETTINGS))


# --- directories --------------------------------------------------------------------------------------------


def parquet(columns: dict[str, list[Any]]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table(columns), target)
    return target.getvalue()


PLAIN = {
    "train-a.jsonl": line("one", id=1) + line("two", id="2"),
    "extra.jsonl": line("three", meta={"a": [1]}),
    "test.csv": b"text,n\nfour,1\n",
    "validation.txt": b"five\nis one document\n",
    "deep/er/dev.parquet": parquet({"n": [1], "text": ["six"]}),
    "deep/B.JSONL.GZ": gzip.compress(line("seven")),
}


def test_a_directory_is_its_files_as_the_glob_reads_them(tmp_path: Path) -> None:
    tree(tmp_path / "d", PLAIN)
    found = find_sources(str(tmp_path / "d"), SETTINGS)
    for pattern in ("**", "**/*"):
        assert find_sources(str(tmp_path / "d" / pattern), SETTINGS) == found
    assert texts_of(found) == sorted(["one", "two", "three", "four", "five\nis one document\n", "six", "seven"])
    assert [source.names for source in found.sources] == [(name,) for name in sorted(PLAIN)]
    assert found.passed_over == ()


def test_files_of_other_formats_in_a_directory_are_counted_and_named(tmp_path: Path) -> None:
    tree(tmp_path, {**PLAIN, "README.md": b"# Notes\n", "deep/LICENSE": b"", "a.jsonl~": b"", ".DS_Store": b""})
    found = find_sources(str(tmp_path), SETTINGS)
    assert len(found.sources) == len(PLAIN)
    assert books_of(found) == {"unknown_format": (3, "README.md"), "dot": (1, ".DS_Store")}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is a directory without a file to read$"),
        ({"a.pdf": b"", "b/README": b""}, r"without a file to read; .*2 files are not read, of no format .*: a\.pdf"),
        ({".a.jsonl": line("A")}, r"without a file to read; .*1 file is not read, .* a dot.*: \.a\.jsonl"),
    ],
)
def test_a_directory_without_a_file_to_read_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    tree(tmp_path, files)
    with pytest.raises(SourceError, match=message):
        find_sources(str(tmp_path), SETTINGS)


def test_a_split_that_files_cannot_have_is_refused(tmp_path: Path, cache: None) -> None:
    tree(tmp_path / "d", PLAIN)
    tree(tmp_path / "set", {"test/a.jsonl": line("A")})
    other = replace(SETTINGS, split="test")
    for source in (tmp_path / "d", tmp_path / "d" / "**", tmp_path / "d" / "extra.jsonl"):
        with pytest.raises(SourceError, match=r"corpus\.split is 'test', but .* is files, which have no splits"):
            find_sources(str(source), other)
    both = {"files": str(tmp_path / "d" / "extra.jsonl"), "set": str(tmp_path / "set")}
    assert texts_of(find_sources(both, other), other) == ["A", "three"], "the split is the dataset's"


MARKED = {
    "card": {"README.md": CARD},
    "card of Windows": {"README.md": b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n"},
    "damaged card": {"README.md": b"---\na: [\n---\n"},
    "description": {"dataset_info.json": b"{}"},
    "old description": {"dataset_infos.json": b"{}"},
    "yaml": {".huggingface.yaml": b"a: 1"},
    "saved": {"state.json": b"{}"},
    "saved splits": {"dataset_dict.json": b"{}"},
    "split folder": {"validation/a.jsonl": line("A")},
    "split folder in data": {"data/train/a.jsonl": line("A")},
    "shards": {"data/train-00000-of-00002.parquet": b""},
}
UNMARKED = {
    "names of splits": {"train.jsonl": line("A"), "test-1.jsonl": line("A")},
    "no yaml": {"README.md": b"# About\n---\nnot: yaml\n---\n"},
    "a rule, no yaml": {"README.md": b"---\nplain words\n---\n"},
    "an open block": {"README.md": b"---\nlicense: mit\n"},
    "deeper": {"a/README.md": CARD, "a/b/train/a.jsonl": line("A"), "a/state.json": b"{}"},
    "empty folder": {"train/.keep": b""},
    "another folder": {"training-set/a.jsonl": line("A"), "data/a.jsonl": line("A")},
    "shards elsewhere": {"train-00000-of-00002.parquet": b"", "raw/train-00000-of-00002.parquet": b""},
}


@pytest.mark.parametrize("kind", [*MARKED, *UNMARKED])
def test_the_border_between_a_dataset_and_a_directory_of_files(tmp_path: Path, kind: str) -> None:
    assert is_dataset(tree(tmp_path, {"b.jsonl": line("B"), **(MARKED | UNMARKED)[kind]})) == (kind in MARKED)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"train/a.jsonl": line("A"), "extra.jsonl": line("no"), "test/b.jsonl": line("no")}, (1, "extra.jsonl")),
        ({"data/train-00000-of-00001.jsonl": line("A"), "more/extra.txt": b"no"}, (1, "more/extra.txt")),
        ({"README.md": CARD, "train-a.jsonl": line("A"), "extra.jsonl": line("no")}, (1, "extra.jsonl")),
        (
            {
                "README.md": b"---\nconfigs:\n- config_name: default\n  data_files: x/*.jsonl\n---\n",
                "x/a.jsonl": line("A"),
                "y/b.jsonl": line("no"),
                "y/c.jsonl": line("no"),
            },
            (2, "y/b.jsonl"),
        ),
        ({"README.md": CARD, "a.jsonl": line("A")}, None),
    ],
)
def test_files_that_a_dataset_leaves_out_are_named(
    tmp_path: Path, cache: None, files: dict[str, bytes], left: tuple[int, str] | None, streaming: bool
) -> None:
    settings = replace(SETTINGS, streaming=streaming)
    found = find_sources(str(tree(tmp_path / "set", files)), settings)
    assert texts_of(found, settings) == ["A"]
    assert books_of(found) == ({"left_out": left} if left else {})


@pytest.mark.parametrize("splits", [False, True])
def test_files_beside_a_saved_dataset_are_named_and_its_splits_obeyed(tmp_path: Path, splits: bool) -> None:
    one = datasets.Dataset.from_dict({"text": ["A"]})
    (datasets.DatasetDict({"train": one, "test": one}) if splits else one).save_to_disk(tmp_path / "set")
    found = find_sources(str(tree(tmp_path / "set", {"extra.jsonl": line("no")})), SETTINGS)
    assert (texts_of(found), books_of(found)) == (["A"], {"left_out": (1, "extra.jsonl")})
    with pytest.raises(
        SourceError, match=r"no.* dataset with split 'dev': .*read it as files, name them by a glob: .*\*\*"
    ):
        find_sources(str(tmp_path / "set"), replace(SETTINGS, split="dev"))  # fmt: skip


# --- files without a usable record --------------------------------------------------------------------------

USELESS = {
    "nothing.jsonl": b"",
    "blank.jsonl": line(" ") * 2 + b"\n\n",
    "bad.jsonl": b"{oops\n[1]\n",
    "nothing.json": b"",
    "list.json": b"[]",
    "header.csv": b"text\n",
    "nothing.csv": b"",
    "white.txt": b" \n\t",
    "nothing.txt.gz": gzip.compress(b""),
    "none.jsonl.zst": zstandard.compress(b""),
    "rows.parquet": parquet({"text": pa.array([], pa.string())}),
    "nulls.parquet": parquet({"text": pa.array([None, None], pa.string())}),
}


@pytest.mark.parametrize("group_files", [1, 100])
def test_a_file_without_a_usable_record_is_named_on_the_terminal_and_in_the_manifest(
    tmp_path: Path, analyze_config: Callable[..., AnalyzeConfig], corpus_dir: Path, group_files: int
) -> None:
    folder = tree(tmp_path / "d", {**USELESS, ".b.jsonl": line("B")})
    (folder / "good.jsonl").write_bytes((corpus_dir / "prose.jsonl").read_bytes())
    corpus = {"source": {"mine": str(folder)}, "group_files": group_files}
    config = analyze_config(tmp_path / "store", corpus=corpus, saes=analyze_config(tmp_path).saes[:1])
    assert "warning   corpus.source" in describe(make_plan(config), config.cluster)
    for again in (False, True):
        heard: list[str] = []
        analysis = analyze(config, heard.append)
        assert analysis.is_new is not again
        warnings = [one for one in heard if one.startswith("warning: ")]
        (told,) = (one for one in warnings if "no usable record" in one)
        assert told.startswith("warning: 12 files have no usable record: bad.jsonl of slice mine, blank.jsonl of slice")
        assert told.endswith(" and 2 more; the manifest names all")
        assert any("1 file is not read, because a name begins with a dot" in one for one in warnings)
        sources = analysis.catalog.manifest.coverage.sources
        assert sorted(name for source in sources for name in source.unused_files) == sorted(USELESS)
        (book,) = analysis.catalog.manifest.passed_over
        assert Counter(book) == {"where": str(folder), "why": "dot", "count": 1, "first": ".b.jsonl"}
