"""Where everything lies in a store: the one place that spells keys."""


def source(preparation_id: str, source_id: str) -> str:
    """What preparing a source gave."""
    return f"corpora/{preparation_id}/sources/{source_id}.json"


def preparation(preparation_id: str) -> str:
    """What decides tokens and contexts."""
    return f"corpora/{preparation_id}/manifest.json"


def shard(preparation_id: str, shard_id: str) -> str:
    """The contexts of a shard."""
    return f"corpora/{preparation_id}/shards/{shard_id}.parquet"


def quarantine(preparation_id: str, source_id: str) -> str:
    """The bad records of a source."""
    return f"corpora/{preparation_id}/quarantine/{source_id}.jsonl"


def measure(measure_id: str) -> str:
    """What decides a partial's bytes, and a config that asked for it."""
    return f"measures/{measure_id}/manifest.json"


def partials(measure_id: str) -> str:
    """The folder of partials and nodes."""
    return f"measures/{measure_id}/partials"


def partial(measure_id: str, sha256: str) -> str:
    """The statistics and samples of one shard under one measure, or of a node, the merge of several."""
    return f"{partials(measure_id)}/{sha256}.zarr.zip"


def receipts(measure_id: str) -> str:
    """The folder of receipts."""
    return f"measures/{measure_id}/receipts"


def receipt(measure_id: str, shard_id: str) -> str:
    """The commit record of a shard."""
    return f"{receipts(measure_id)}/{shard_id}.json"


def nodes(measure_id: str) -> str:
    """The folder of commit records of nodes."""
    return f"measures/{measure_id}/nodes"


def node(measure_id: str, node_id: str) -> str:
    """The commit record of a node."""
    return f"{nodes(measure_id)}/{node_id}.json"


def failure(measure_id: str, shard_id: str) -> str:
    """Why a shard was quarantined."""
    return f"measures/{measure_id}/failures/{shard_id}.json"


def events(run_id: str) -> str:
    """The JSON lines of one run."""
    return f"events/{run_id}.jsonl"


def next_file(key: str, number: int) -> str:
    """What follows a file of JSON lines that is full; number 0 is the file itself."""
    return key if number == 0 else f"{key.removesuffix('.jsonl')}.{number:06d}.jsonl"


def run_plan(run_id: str) -> str:
    """Which shards a run means to analyse, under which measures."""
    return f"plans/{run_id}.json"


def catalogs() -> str:
    """The folder of all catalogs."""
    return "catalogs"


def catalog(name: str) -> str:
    """The folder of a catalog."""
    return f"{catalogs()}/{name}"


def identity(name: str) -> str:
    """The fields that every snapshot of a catalog shares."""
    return f"{catalog(name)}/identity.json"


def snapshot(name: str, number: int, file: str) -> str:
    """A file of a numbered snapshot."""
    return f"{catalog(name)}/{number:06d}/{file}"


def ablation(name: str, number: int, digest: str) -> str:
    """Causal evidence about features of a snapshot."""
    return f"{catalog(name)}/ablations/{number:06d}-{digest}.parquet"


def latest(name: str) -> str:
    """A hint at the newest snapshot; the numbered manifests are the truth."""
    return f"{catalog(name)}/latest.json"


def attached(name: str, number: int, file: str) -> str:
    """A table that a later job adds to a numbered snapshot, which itself never changes."""
    return f"{catalog(name)}/attached/{number:06d}/{file}"
