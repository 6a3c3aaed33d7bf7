"""`sae-discover`: which features does this prompt use? One prompt, or a file of them."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pydantic
from rich.table import Table
from rich.text import Text

from sae_census.cli import command
from sae_census.cli.show import console, marked, printable
from sae_census.config import ClusterConfig, DiscoverRequest, DiscoveryConfig, ModelConfig
from sae_census.errors import ConfigError
from sae_census.findings import Discovery, MeasuredFeature
from sae_census.flows.discovery.batch import discover_batch
from sae_census.flows.discovery.discover import discover
from sae_census.flows.discovery.rank_drift import rank_drift
from sae_census.io import answers
from sae_census.steps.discovery.lines import PASSED_OVER
from sae_census.steps.model.sae_map import saes_named

_LISTS = {"layers": int, "streams": str, "restrict_features": int}
_NULLABLE = {"max_norm_ratio": float, "first_positions": int, "attention_sinks": bool}
_LABEL_WIDTH = 26
_OURS = {"sae_id", "model_id", "tau"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `sae-discover --help` lists every flag")


def main() -> None:
    """Run the command and exit."""
    sys.exit(command.guarded(_run, DiscoverRequest))


def _run() -> int:
    given = vars(_parser().parse_args())
    if given["compare"]:
        return _compare(given)
    out = Path(given["out"]) if given["out"] else None
    if out is not None:
        answers.check_suffix(out)
    config = _config(given)
    request = {name: given[name] for name in DiscoverRequest.model_fields if given.get(name) is not None}
    request["sae_id"] = config.sae_id
    if given["prompts_file"]:
        return _batch(given, config, request, out)
    if given["workers"] is not None:
        raise ConfigError("--workers share out a --prompts_file; leave it out for one prompt")
    try:
        answer = discover(config, DiscoverRequest.model_validate(request))
    except pydantic.ValidationError as error:
        raise ConfigError(command.sentence(DiscoverRequest, error)) from error
    if out is None:
        show(answer)
    else:
        answers.write(out, [answer.model_dump()], many=False)
        for note in answer.analyzed.notes:
            print(f"note: {note}", file=sys.stderr)
        not_ranked = f", {len(answer.below_gate)} below a gate" if out.suffix in (".json", ".jsonl") else ""
        print(f"{len(answer.features)} features{not_ranked} written to {out}", file=sys.stderr)
    return command.DONE


def _compare(given: dict[str, Any]) -> int:
    if others := [name for name, value in given.items() if name != "compare" and value is not None]:
        raise ConfigError(f"--compare reads two answer files and nothing else; leave out --{', --'.join(others)}")
    drift = rank_drift(*map(Path, given["compare"]))
    print(json.dumps(asdict(drift), indent=1, allow_nan=False))
    for note in drift.notes:
        print(f"note: {note}", file=sys.stderr)
    return command.DONE


def _config(given: dict[str, Any]) -> DiscoveryConfig:
    fields: dict[str, Any] = {name: given[name] for name in ("catalog", "labels", "cache_mb", "threads", "max_tokens")}
    if given["sae"]:
        fields |= {"saes": tuple(saes_named(given["sae"])), "sae_id": given["sae"]}
    model = {name: given[name] for name in ("dtype", "device", "revision", "fix_mistral_regex")} | {
        "id": given["model"]
    }
    try:
        fields["model"] = ModelConfig.model_validate({k: v for k, v in model.items() if v is not None})
        return DiscoveryConfig.model_validate({k: v for k, v in fields.items() if v is not None})
    except pydantic.ValidationError as error:
        raise ConfigError(command.sentence(DiscoveryConfig, error)) from error


def _batch(given: dict[str, Any], config: DiscoveryConfig, request: dict[str, Any], out: Path | None) -> int:
    if out is None:
        raise ConfigError("--prompts_file needs --out, as --out answers.jsonl")
    if "prompt" in request or "text" in request:
        raise ConfigError("give --prompts_file, or --prompt, or --text: one of them")
    try:
        cluster = ClusterConfig(
            workers=1 if given["workers"] is None else given["workers"], threads_per_worker=config.threads
        )
    except pydantic.ValidationError as error:
        raise ConfigError(command.sentence(ClusterConfig, error)) from error
    report = discover_batch(config, request, Path(given["prompts_file"]), out, cluster)
    num_errors = num_passed_over = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal num_errors, num_passed_over
        for record in report.records():
            num_errors += "error" in record
            notes = record.get("analyzed", {}).get("notes", ())
            num_passed_over += any(note.startswith(PASSED_OVER) for note in notes)
            yield record

    answers.write(out, counted(), many=True)
    report.remove()
    resumed = f", {report.num_resumed} of them by an earlier run" if report.num_resumed else ""
    print(
        f"{report.num_prompts} prompts{resumed} in {report.seconds:.1f} s "
        f"({(report.num_prompts - report.num_resumed) / report.seconds:.1f} prompts/s), {num_errors} errors; "
        f"written to {out}",
        file=sys.stderr,
    )
    if num_passed_over:
        print(
            f"{num_passed_over} lines have keys that are no options; the notes of their answers name them",
            file=sys.stderr,
        )
    if report.num_blank:
        print(f"{report.num_blank} blank lines passed over", file=sys.stderr)
    return command.PARTLY if num_errors == report.num_prompts else command.DONE


def show(answer: Discovery) -> None:
    """Print an answer for people."""
    screen = console()
    analyzed = answer.analyzed
    title = f"{analyzed.mode} by {analyzed.score_mode}"
    screen.print(_table(title, [(f"{feature.rank}", feature) for feature in answer.features]))
    if answer.below_gate:
        gates = {"min_coverage_pct": "low", "return_top_x": "cut", "silent": "-"}
        below = [(gates[feature.gate], feature) for feature in answer.below_gate]
        screen.print(_table(f"not ranked (low: coverage below {analyzed.min_coverage:g})", below))
    if analyzed.tokens_generated:
        screen.print(Text(f"continuation ({analyzed.generation}): {printable(analyzed.text)[-400:]}"))
    screen.print(
        f"{analyzed.tokens_kept} of {analyzed.tokens} tokens kept, {analyzed.features_scored} features fire there, "
        f"{analyzed.features_gated} below coverage {analyzed.min_coverage:g}; tau: {analyzed.tau}",
        highlight=False,
    )
    for note in analyzed.notes:
        screen.print(Text(f"note: {note}"))


def _table(title: str, rows: Sequence[tuple[str, MeasuredFeature]]) -> Table:
    """Features, each with its rank or the gate that kept it out."""
    table = Table(title=title, title_justify="left")
    for name, width in (("rank", 4), ("feature", 20), ("score", 8), ("coverage", 8), ("max", 6), ("pctl", 4)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    labelled = any(feature.proto_label for _, feature in rows)
    if labelled:
        table.add_column("label", no_wrap=True, width=_LABEL_WIDTH)
    table.add_column("strongest span", no_wrap=True)
    for rank, feature in rows:
        cells = [rank, f"{feature.layer}/{feature.stream}/{feature.feature_id}", f"{feature.score:.4g}"]
        cells += [f"{feature.scores.coverage:.0%}", f"{feature.scores.max:.4g}"]
        share = feature.catalog.percentile if feature.catalog else None
        cells.append("" if share is None else f"{share:.0%}")
        if labelled:
            cells.append(printable(feature.proto_label or ""))
        spans = feature.top_spans[:1]
        text = (
            marked(spans[0].tokens, spans[0].peak - spans[0].position[0], 22 if labelled else 50) if spans else Text()
        )
        table.add_row(*map(Text, cells), text)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sae-discover", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", help="hub id, directory or GGUF file; default: the embedded model")
    parser.add_argument("--revision", help="of a model on the hub")
    mend = _help(ModelConfig.model_fields["fix_mistral_regex"])
    parser.add_argument("--fix_mistral_regex", type=_boolean, help=mend, metavar="FIX")
    parser.add_argument("--sae", help="directory, hub id, folder of SAEs, or YAML mapping '22/resid_pre: path'")
    parser.add_argument(
        "--prompts_file",
        help="JSON lines: {'prompt': …}, {'text': …} or strings, with an id and options of their own if you like",
    )
    parser.add_argument("--out", help=f"file to write: {', '.join(answers.SUFFIXES)}; default: a table on the terminal")
    for name in ("catalog", "labels", "cache_mb", "threads", "max_tokens"):
        field = DiscoveryConfig.model_fields[name]
        kind: Any = str if name in ("catalog", "labels") else int
        parser.add_argument(f"--{name}", type=kind, help=_help(field))
    parser.add_argument("--workers", type=int, help="of a --prompts_file, on Ray if more than one [1]")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two answer files for the same prompts: rank drift"
    )
    parser.add_argument("--device", help="auto, cpu, cuda")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--tau", type=_tau, help="p95, p95_nonzero, quantile:0.9 or constant:0.5")
    for name, field in DiscoverRequest.model_fields.items():
        if name in _OURS:
            continue
        names = [f"--{name}"] + (["--min_coverage"] if name == "min_coverage_pct" else [])
        if name in _LISTS:
            parser.add_argument(*names, nargs="*", type=_LISTS[name], help=_help(field))
        else:
            default = _NULLABLE.get(name, type(field.default))
            kind = {bool: _boolean, int: int, float: float}.get(default, str)
            parser.add_argument(*names, type=kind, help=_help(field), metavar=name.upper())
    return parser


def _help(field: Any) -> str:
    default = "" if field.default in (None, []) else f" [{str(field.default).lower()}]"
    return f"{field.description}{default}".replace("%", "%%")


def _boolean(given: str) -> bool:
    if given.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {given!r}")
    return given.lower() == "true"


def _tau(given: str) -> dict[str, Any]:
    mode, _, value = given.partition(":")
    try:
        return {"mode": mode} | ({"value": float(value)} if value else {})
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected p95, p95_nonzero, quantile:q or constant:c, got {given!r}"
        ) from error
