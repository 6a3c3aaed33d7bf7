"""From a command line to a frozen config and an exit code: the door to Hydra.

Hydra composes plain YAML over the defaults of the job's config model; the model validates. Every error a
user can mend is one line on stderr. Exit codes: 0 done, 2 the user must change something, 3 some shards
failed, 130 interrupted.
"""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from sae_census.errors import CensusError, UserError

CONF = Path(__file__).resolve().parent.parent / "conf"
Config = TypeVar("Config", bound=BaseModel)
DONE, USER, PARTLY, INTERRUPTED = 0, 2, 3, 130


def main(name: str, model: type[Config], job: Callable[[Config], int]) -> None:
    """Run a job as a program and exit.

    Args:
        name: of the primary YAML in `conf/`.
        model: its config model; its defaults are the base of the composition.
        job: does the work and returns an exit code.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed and turned into exit code 1
    defaults = model().model_dump(mode="json")
    for key in _free_mappings(model):
        defaults[key] = None  # Hydra adds no keys to a mapping, not even to an empty one
    ConfigStore.instance().store(name=f"{name}_defaults", node=defaults)
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def run(composed: DictConfig) -> None:
        # Guarded inside, too: Hydra would add lines of its own to an error that passes through it.
        codes.append(guarded(lambda: job(validate(model, composed)), model))

    def all_runs() -> int:
        run()
        return max(codes, default=DONE)

    sys.exit(guarded(all_runs, model))


def validate(model: type[Config], composed: DictConfig) -> Config:
    """A composed config as the frozen model.

    Raises:
        UserError: naming the first key that is wrong.
    """
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    for key in _free_mappings(model):
        plain[key] = {} if plain.get(key) is None else plain[key]
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise UserError(sentence(model, error)) from error


def _free_mappings(model: type[BaseModel]) -> list[str]:
    """The keys whose own keys the user makes up."""
    return [name for name, field in model.model_fields.items() if field.default == {}]


def guarded(run: Callable[[], int], model: type[BaseModel]) -> int:
    """The exit code of a run; what it raises becomes one line on stderr. `model` knows the keys a user may mean."""
    try:
        return run()
    except UserError as error:
        return _say(" ".join(str(error).split()), USER)
    except (HydraException, OmegaConfBaseException) as error:
        return _say(_hydra_sentence(error, model), USER)
    except CensusError as error:
        return _say(str(error), PARTLY)
    except KeyboardInterrupt:
        return _say("interrupted; the same command goes on where this one stopped", INTERRUPTED)


def _say(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


def sentence(model: type[BaseModel], error: ValidationError) -> str:
    """What is wrong with the first wrong key."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return unknown_key(key, model)
    reason = first["msg"].removeprefix("Value error, ")
    return f"{key or 'config'} is {first['input']!r:.200}: {reason}" if key else reason


def _hydra_sentence(error: Exception, model: type[BaseModel]) -> str:
    text = str(error)
    for line in text.splitlines():
        if "Could not override" in line:
            return unknown_key(line.split("'")[1], model)
    return " ".join(text.split())


def unknown_key(key: str, model: type[BaseModel]) -> str:
    """The sentence for a key that no config has, with the nearest that it has."""
    known = sorted(_keys(model))
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    leaf = [k for k in known if k.rsplit(".", 1)[-1] == plain.rsplit(".", 1)[-1]]
    hint = [*leaf, *difflib.get_close_matches(plain, known, n=1, cutoff=0.5)][:1]
    advice = f"did you mean {hint[0]}?" if hint else f"there are {', '.join(model.model_fields)}"
    return f"config key {key} is not known; {advice}"


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)), None)
        if inner is not None:
            found += _keys(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
