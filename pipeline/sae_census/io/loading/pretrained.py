"""What a model id names: a hub id, a directory, or a GGUF file, and the content that identifies it.

A GGUF file is converted once into a directory of safetensors in the cache, so that every later load is a
memory map. No pickle is loaded and no remote code runs unless `trust_remote_code` says so.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sae_census.errors import CheckpointError
from sae_census.io import embedded
from sae_census.io.loading import gguf_tokenizer, library_warnings, soundness

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
MODEL_PATTERNS = (*WEIGHT_PATTERNS, "config.json")
"""The files that decide what a model computes."""
CONVERSION = 2
"""Raise it when GGUF files are converted or proved in another way: what an older one left in the cache is not used."""
_CONVERTED = "converted.json"
"""In a converted directory: the digest that its model had when it was written."""


def _quiet() -> None:
    """No bars of transformers; what it warns of is passed on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    library_warnings.take_over()


def _sha256(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _convert_gguf(path: Path) -> Path:
    """The cached safetensors directory of a GGUF file; made at the first call, named by the file's digest.

    The version of the rules for tokenizers is in the name, so that a conversion under other rules is made anew.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'")
    target = embedded.cache_dir() / "models" / f"{_sha256([path])[:16]}-{CONVERSION}.{gguf_tokenizer.RULES_VERSION}"
    if (target / _CONVERTED).exists():
        return target

    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with library_warnings.captured(), contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            tokenizer = tokenizer_of_gguf(path)
            model = _load_gguf(path)
        # The loader leaves the quantisation's description in the config, and then refuses to save itself.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / _CONVERTED).write_text(json.dumps({"digest": digest(draft, MODEL_PATTERNS, None)}))
        draft.replace(target)
    except CheckpointError:
        raise
    except Exception as error:  # parsers, disks and the rename each have errors of their own
        if not target.exists():  # another process may have finished the same conversion first
            raise CheckpointError(f"{path} could not be converted from GGUF: {first_line(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def tokenizer_of_gguf(path: Path) -> Any:
    """The tokenizer of a GGUF file, as transformers has them.

    Raises:
        CheckpointError: if the file asks for rules that are not known here.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = gguf_tokenizer.read_tokenizer(path)
    if found is None:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return PreTrainedTokenizerFast(
        tokenizer_object=found.backend,
        chat_template=found.chat_template,
        clean_up_tokenization_spaces=False,
        **found.special,
    )


def _load_gguf(path: Path) -> Any:
    """The model of a GGUF file, proved to have all its tensors and no others.

    Raises:
        CheckpointError: naming tensors that the file lacks, or that the converter does not place.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    model, report = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    soundness.check_report(model, report, str(path), allow_headless=False)
    reader = GGUFReader(path)
    family = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=model.config.to_dict())
    placed = get_gguf_hf_weights_map(model, processor)
    names = [tensor.name for tensor in reader.tensors]  # experts are placed by a name without its ending
    if lost := [name for name in names if not {name, name.removesuffix(".weight")} & placed.keys()]:
        raise CheckpointError(
            f"{len(lost)} tensors of {path} are not read by the converter: {soundness.listed(lost)}; what the model "
            "computes without them is something else: name the directory or hub id that the file was made from"
        )
    scaling = reader.fields.get(f"{family}.rope.scaling.type")
    if scaling is not None and (kind := bytes(scaling.parts[-1]).decode()) != "none":
        raise CheckpointError(
            f"{path} stretches positions ({family}.rope.scaling.type is {kind}), which the converter leaves out; "
            "name the directory or hub id that the file was made from"
        )
    soundness.check_values(model, str(path))
    return model


def resolve(model_id: str, revision: str | None) -> Path | str:
    """What `from_pretrained` should load: a local directory, or the hub id itself.

    Raises:
        CheckpointError: if a local path does not hold a model, or a revision is asked of it.
    """
    _quiet()
    path = Path(model_id).expanduser()
    if revision is not None and (path.exists() or model_id.startswith(embedded.PREFIX)):
        raise CheckpointError(
            f"model.revision is {revision!r}, but model.id {model_id} lies on this machine and has no revisions; leave "
            "it out, or name a hub id"
        )
    if model_id.startswith(embedded.PREFIX):
        return _convert_gguf(embedded.model_path())
    if path.is_file():
        if path.suffix == ".gguf":
            return _convert_gguf(path)
        raise CheckpointError(f"model.id {model_id} is a file; expected a GGUF file, a directory or a hub id")
    if not path.is_dir():
        if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 1:
            raise CheckpointError(f"model.id {model_id} does not exist; expected a directory, a GGUF file or a hub id")
        return model_id
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model directory {model_id} has no config.json; is it a saved model?")
    if not any(next(path.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        raise CheckpointError(
            f"model directory {model_id} has no weights; expected model.safetensors (or pytorch_model.bin) "
            "beside config.json"
        )
    return path


def digest(source: Path | str, patterns: Sequence[str], commit: str | None) -> str:
    """Identity by content for a directory, by commit for a hub id."""
    if isinstance(source, Path):
        return _sha256(sorted({p for pattern in patterns for p in source.glob(pattern)}))
    return hashlib.sha256(f"{source}@{commit}".encode()).hexdigest()


def model_digest(source: Path | str, commit: str | None) -> str:
    """Identity of a model: of its weights and config.

    Raises:
        CheckpointError: if it is a cached conversion that is no longer what was converted.
    """
    found = digest(source, MODEL_PATTERNS, commit)
    if isinstance(source, Path) and (source / _CONVERTED).exists():
        then = json.loads((source / _CONVERTED).read_text())["digest"]
        if found != then:
            raise CheckpointError(f"the model converted to {source} was changed or damaged: remove that folder")
    return found


def first_line(error: Exception) -> str:
    """What an error says at first; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
