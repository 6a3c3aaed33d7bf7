"""Tables of a linearised feature for people: tokens of a batch, vocabulary items, heads; shown, saved, shaded."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_census.compute.effects.tangent import strongest
from sae_census.flows.effects.linearized import READ_OUTS
from sae_census.io import report
from sae_census.io.model.language_model import LanguageModel
from sae_census.io.report import Cell, Grid, Section
from sae_census.io.store import tables
from sae_census.io.store.blobs import LocalBlobs

_READABLE = str.maketrans({" ": "·", "\n": "↩\n", "\t": "→"})


def make_token_df(tokens: Tensor, model: LanguageModel, len_prefix: int = 5, len_suffix: int = 1) -> Any:
    """A pandas data frame with a row for every token of a batch, contexts one after another.

    Columns: `str_tokens`, `unique_token` (token/position), `context` (text before|token|text after), `batch`, `pos`,
    `label` (batch/position). Spaces show as ·, line ends as ↩, tabs as →.

    Args:
        tokens: (contexts, T) ids.
        model: knows the tokenizer.
        len_prefix: tokens of `context` before the token.
        len_suffix: tokens after it.

    Returns:
        A `pandas.DataFrame` of contexts x T rows.

    >>> frame = make_token_df(tokenizer("river water", return_tensors="pt").input_ids, model)
    >>> list(frame.columns)
    ['str_tokens', 'unique_token', 'context', 'batch', 'pos', 'label']
    >>> frame["label"].iloc[-1].startswith("0/")
    True
    """
    return tables.from_columns(_token_columns(torch.as_tensor(tokens), model, len_prefix, len_suffix)).to_pandas()


def _token_columns(tokens: Tensor, model: LanguageModel, len_prefix: int = 5, len_suffix: int = 1) -> dict[str, Any]:
    num_contexts, num_positions = tokens.shape
    rows = [[text.translate(_READABLE) for text in row] for row in model.tokenizer.token_texts(tokens.tolist())]
    batch, pos = np.indices((num_contexts, num_positions)).reshape(2, -1).tolist()
    contexts = [
        f"{''.join(row[max(0, p - len_prefix) : p])}|{row[p]}|{''.join(row[p + 1 : p + 1 + len_suffix])}"
        for row in rows
        for p in range(num_positions)
    ]
    flat = [text for row in rows for text in row]
    return {
        "str_tokens": flat,
        "unique_token": [f"{text}/{p}" for text, p in zip(flat, pos, strict=True)],
        "context": contexts,
        "batch": batch,
        "pos": pos,
        "label": [f"{b}/{p}" for b, p in zip(batch, pos, strict=True)],
    }


def linearized_tables(
    result: dict[str, Any], tokens: Tensor, model: LanguageModel, head: int = 20
) -> dict[str, tables.Table]:
    """The tables of a linearised feature, each sorted by its last column, highest first.

    `activations` and `scores`: the `head` tokens of the batch with the highest codes and activation scores;
    `input_tokens`: vocabulary items on the direct path; `heads`: vocabulary items by read-out and head (sorted within
    them), if attention writes to the linearised stream.

    Args:
        result: of `analyze_linearized_feature`.
        tokens: (contexts, T) ids of its batch.
        model: knows the tokenizer.
        head: rows of the first two.
    """
    columns = _token_columns(torch.as_tensor(tokens), model)
    found = {}
    per_token = {
        "activations": result["sae activations"][:, result["feature_idx"]],
        "scores": result["activation scores"],
    }
    for name, values in per_token.items():
        best = strongest(values, head).tolist()
        picked = {column: [every[i] for i in best] for column, every in columns.items()}
        found[name] = tables.from_columns(picked | {"feature": values[best].tolist()})
    found["input_tokens"] = tables.from_columns(
        {"str_tokens": result["token strings"], "feature_scores": result["token scores"].tolist()}
    )
    if result["attention layer"] is not None:
        rows = [
            {"read_out": name, "head": number, "rank": rank, "str_tokens": text, "feature_scores": score}
            for name in READ_OUTS
            for number, texts in enumerate(result[f"{name} token strings"])
            for rank, (text, score) in enumerate(
                zip(texts, result[f"{name} token scores"][number].tolist(), strict=True)
            )
        ]
        found["heads"] = tables.from_columns({name: [row[name] for row in rows] for name in rows[0]})
    return found


def save_linearized(
    result: dict[str, Any], tokens: Tensor, model: LanguageModel, folder: str | Path, head: int = 20
) -> Path:
    """Write the tables of a linearised feature as Parquet files and, shaded, as one page `linearized.html`.

    Args:
        result: of `analyze_linearized_feature`.
        tokens: (contexts, T) ids of its batch.
        model: knows the tokenizer.
        folder: is made.
        head: rows of the tables of tokens.

    Returns:
        The folder.

    >>> tokens = tokenizer("river water stone bridge", return_tensors="pt").input_ids
    >>> result = analyze_linearized_feature(42, 0, 3, model, tokens, sae, batch_size=1)
    >>> sorted(path.name for path in save_linearized(result, tokens, model, folder / "linear").iterdir())
    ['activations.parquet', 'heads.parquet', 'input_tokens.parquet', 'linearized.html', 'scores.parquet']

    Raises:
        StorageError: if the disk refuses.
    """
    blobs = LocalBlobs(folder)
    found = linearized_tables(result, tokens, model, head)
    for name, table in found.items():
        blobs.put(f"{name}.parquet", tables.to_bytes(table))
    quality = result["quality"]
    note = (
        f"Pre-activation {result['pre-activation']:.4g} at the point. Over the batch, tangent estimates and true "
        f"pre-activations have rank correlation {quality.rank_correlation:.2f} and agree in sign on "
        f"{quality.sign_agreement:.0%} of tokens."
    )
    sections = [Section(title=name, tables=(_grid(table),)) for name, table in found.items()]
    blobs.put("linearized.html", report.page(f"Feature {result['feature_idx']}, linearised", note, sections))
    return blobs.root


def _grid(table: tables.Table) -> Grid:
    rows = table.to_pylist()
    score = table.column_names[-1]
    most = max((abs(row[score]) for row in rows), default=0) or 1
    return Grid(
        caption="",
        header=tuple(table.column_names),
        rows=tuple(
            tuple(
                Cell(text=f"{value:.4g}", shade=value / most) if name == score else Cell(text=str(value))
                for name, value in row.items()
            )
            for row in rows
        ),
    )
