"""A power cut at any moment: whatever a record promises is on the disk, or the record is not.

The disk of these tests keeps what was synced and nothing else: of a file the bytes that it had, of a folder the entries
that it had, when it was last synced. What a folder got since is dropped, but for the one entry that came last, which
may survive on its own: file systems write entries in any order.
"""

import errno
import functools
import hashlib
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import write_corpus

from sae_census.errors import CorruptError
from sae_census.flows.census.analyze import analyze
from sae_census.flows.census.compact import compact
from sae_census.io.store import blobs as blobs_module
from sae_census.io.store.blobs import LocalBlobs
from sae_census.records import Node, Receipt, SourceRecord, unsealed
from sae_census.steps.store.progress import RunLog


@dataclass
class Disk:
    """What survives."""

    top: Path
    bodies: dict[int, bytes] = field(default_factory=dict)
    """Of files that were synced, by inode."""
    entries: dict[int, dict[str, int]] = field(default_factory=dict)
    """Of folders that were synced, by inode."""
    folders: set[int] = field(default_factory=set)
    """Inodes of those that an entry was seen of."""
    held: dict[int, int] = field(default_factory=dict)
    """Open handles, so that no inode is used twice."""
    num_syncs: int = 0

    def synced(self, handle: int) -> None:
        """Take in what a handle stands for."""
        self.num_syncs += 1
        facts = os.fstat(handle)
        if facts.st_ino not in self.held:
            self.held[facts.st_ino] = os.dup(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if stat.S_ISDIR(facts.st_mode):
            self.entries[facts.st_ino] = {one.name: one.stat().st_ino for one in path.iterdir()}
            self.folders |= {one.stat().st_ino for one in path.iterdir() if one.is_dir()}
        else:
            self.bodies[facts.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def survivors(self, extra: Path | None = None) -> dict[str, bytes]:
        """Every file that can be reached after a power cut now, by its path under the top.

        Args:
            extra: an entry that survives although its folder was not synced.
        """
        lone = {} if extra is None else {extra.parent.stat().st_ino: (extra.name, extra.stat().st_ino)}
        found: dict[str, bytes] = {}

        def walk(inode: int, prefix: str) -> None:
            here = dict(self.entries.get(inode, {}))
            if inode in lone:
                here |= [lone[inode]]
            for name, below in here.items():
                if below in self.folders:
                    walk(below, f"{prefix}{name}/")
                else:
                    found[f"{prefix}{name}"] = self.bodies.get(below, b"")  # a name whose bytes never came

        walk(self.top.stat().st_ino, "")
        return found

    def close(self) -> None:
        for handle in self.held.values():
            os.close(handle)


def broken_promises(files: dict[str, bytes]) -> list[str]:
    """Records among some files that can be read, and name bytes which are not there."""
    broken = []
    sha256 = {key: hashlib.sha256(body).hexdigest() for key, body in files.items()}
    for key, body in files.items():
        if not key.endswith(".json") or ".zarr/" in key or key.endswith("reserved.json"):
            continue
        folder, name = key.split("/")[-2:]
        try:
            content, _ = unsealed(body, key)
        except CorruptError:
            broken.append(f"{key} is half written")
            continue
        root = key.split("/")[0]
        wanted: dict[str, str] = {}
        if folder == "receipts":
            receipt = Receipt.read(body, key)
            wanted = {receipt.partial.key: receipt.partial.sha256}
            if is_stood_for(receipt, files, sha256, root):
                continue
        elif folder == "sources":
            shards = SourceRecord.read(body, key).files_sha256
            corpus = "/".join(key.split("/")[1:-2])
            wanted = {f"{corpus}/shards/{shard}.parquet": digest for shard, digest in shards.items()}
        elif name == "manifest.json" and "files" in content:
            snapshot = "/".join(key.split("/")[1:-1])
            wanted = {f"{snapshot}/{file}": facts["sha256"] for file, facts in content["files"].items()}
        elif name == "latest.json":
            catalog = "/".join(key.split("/")[:-1])
            if f"{catalog}/{content['snapshot']:06d}/manifest.json" not in files:
                broken.append(f"{key} points nowhere")
        broken += [f"{key} names {file}" for file, digest in wanted.items() if sha256.get(f"{root}/{file}") != digest]
    return broken


def is_stood_for(receipt: Receipt, files: dict[str, bytes], sha256: dict[str, str], root: str) -> bool:
    """Whether a sound node stands for a pruned shard."""
    for key, body in files.items():
        if "/nodes/" in key:
            node = Node.read(body, key)
            sound = sha256.get(f"{root}/{node.merged.key}") == node.merged.sha256
            if sound and receipt.shard.shard_id in node.shards:
                return True
    return False


@contextmanager
def watched(top: Path, monkeypatch: pytest.MonkeyPatch, at_each: Callable[[Disk, str], None]) -> Iterator[Disk]:
    """Every moment at which something more could have survived, while the block runs."""
    disk = Disk(top)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 14), hard))
    sync, move, link, unlink = os.fsync, os.replace, os.link, os.unlink
    handle = os.open(top, os.O_RDONLY)
    disk.synced(handle)
    os.close(handle)

    def fsync(handle: int) -> None:
        sync(handle)
        disk.synced(handle)
        at_each(disk, "")

    def replace(source, target) -> None:
        move(source, target)
        at_each(disk, str(target))

    def linked(source, target) -> None:
        link(source, target)
        at_each(disk, str(target))

    def unlinked(path, **options) -> None:
        """The deletion survives at once, whatever was synced."""
        unlink(path, **options)
        entries = disk.entries.get(Path(path).parent.stat().st_ino, {})
        entries.pop(Path(path).name, None)
        at_each(disk, "")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "link", linked)
        patch.setattr(os, "unlink", unlinked)
        try:
            yield disk
        finally:
            disk.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Judge:
    """Looks for broken promises at every moment, and counts the moments."""

    def __init__(self):
        self.broken: list[str] = []
        self.moments = 0
        self._seen: set[bytes] = set()

    def __call__(self, disk: Disk, extra: str) -> None:
        if extra and ".draft-" in extra:
            return
        self.moments += 1
        files = disk.survivors(Path(extra) if extra else None)
        if not extra or extra.endswith(".json"):
            self.broken += broken_promises(files)


@pytest.fixture
def tiny(analyze_config, sae_dirs, tmp_path):
    """A config over a handful of shards; `tmp_path` itself is on the disk."""
    texts = tmp_path / "texts"
    texts.mkdir()
    write_corpus(texts / "a.jsonl", seed=5, num_documents=3)
    (tmp_path / "disk").mkdir()
    return functools.partial(
        analyze_config,
        tmp_path / "disk" / "runs",
        saes=[{"path": str(sae_dirs["early"])}],
        corpus={"source": str(texts / "*.jsonl"), "shard_tokens": 80},
    )


def test_what_records_promise_survives_a_power_cut_at_any_moment_of_an_analysis(tiny, tmp_path, monkeypatch):
    judge = Judge()
    with watched(tmp_path / "disk", monkeypatch, judge) as disk:
        made = analyze(tiny(), lambda line: None).catalog
        files = disk.survivors()
    assert judge.broken == []
    assert judge.moments > 150
    # and at the end nothing is left to chance
    there = {p.relative_to(tmp_path / "disk").as_posix() for p in (tmp_path / "disk").rglob("*") if p.is_file()}
    lost = {key for key in there if files.get(key) != (tmp_path / "disk" / key).read_bytes()}
    assert lost == set()
    assert f"runs/catalogs/default/{made.number:06d}/statistics.zarr/zarr.json" in files


def test_what_records_promise_survives_a_power_cut_at_any_moment_of_a_compaction(tiny, tmp_path, monkeypatch):
    judge = Judge()
    with watched(tmp_path / "disk", monkeypatch, judge):
        analyze(tiny(), lambda line: None)
        judge.moments = 0
        found = compact(tmp_path / "disk" / "runs", "default", prune=True, say=lambda line: None)
    assert found.num_pruned > 1
    assert judge.broken == []
    assert judge.moments > found.num_pruned


def test_a_run_goes_on_after_a_power_cut_and_gives_the_same_catalog(tiny, tmp_path, monkeypatch):
    cuts: list[dict[str, bytes]] = []

    def remember(disk: Disk, extra: str) -> None:
        if extra.endswith(".json") and disk.num_syncs % 3 == 0:
            cuts.append(disk.survivors())

    with watched(tmp_path / "disk", monkeypatch, remember):
        whole = analyze(tiny(), lambda line: None).catalog.digest
    for number in (len(cuts) // 2, len(cuts) - 1):
        root = tmp_path / f"cut-{number}"
        for key, body in cuts[number].items():
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(body)
        again = analyze(tiny(store={"root": str(root / "runs")}), lambda line: None)
        assert again.catalog.digest == whole


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOTSUP])
def test_a_file_system_that_does_not_sync_folders_is_told_of_once(tmp_path, monkeypatch, capsys, number):
    sync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(blobs_module, "_WEAKER", {})
    for key in ("a/b", "c/d"):
        blobs = LocalBlobs(tmp_path)
        blobs.put(key, b"body")
        assert blobs.put_if_absent(f"{key}/e".replace("/", "-"), b"body")
    told = capsys.readouterr().err
    assert told.count("warning: the file system of") == 1
    assert "does not sync folders" in told
    log = RunLog(blobs, "events/run.jsonl", lambda line: None)
    log.event("done", {"snapshot": None, "is_new": False})
    log.event("done", {"snapshot": None, "is_new": False})
    assert blobs.get("events/run.jsonl").decode().count("does not sync folders") == 1


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_a_file_system_without_hard_links_is_told_of_once_and_one_writer_wins(tmp_path, monkeypatch, capsys, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(blobs_module, "_WEAKER", {})
    blobs = LocalBlobs(tmp_path)
    assert blobs.put_if_absent("a/b", b"one")
    assert not LocalBlobs(tmp_path).put_if_absent("a/b", b"two")
    assert blobs.get("a/b") == b"one"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert capsys.readouterr().err.count("has no hard links") == 1
