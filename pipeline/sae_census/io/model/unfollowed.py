"""Ways to generate that tracking, and edits at chosen positions, cannot follow, refused before they begin.

Tracked codes are those of the rows that ran, and positions are chosen by what a row held before. Beams, and whatever
else moves rows or runs the model on a text beside the one that grows, return rows that are not those.
"""

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from torch import nn

from sae_census.errors import ArgumentError

_WAY_OUT = "generate without tracking, or with positions='all', and run the result through the model again"


class Unfollowed:
    """Inside a `with` block, the `generate` of a model of transformers checks first what it is asked for."""

    def __init__(self, module: nn.Module, is_followed: Callable[[], bool]):
        """Prepare; without `generate` and its config there is nothing to check.

        Args:
            module: whose `generate` it is.
            is_followed: whether the context that calls it collects codes, or chooses positions.
        """
        self._own = module.__dict__
        self._was = self._own.get("generate")
        self._guard: _Guard | None = None
        if hasattr(module, "generation_config") and hasattr(type(module), "generate"):
            self._guard = _Guard(module, getattr(module, "generate"), is_followed)  # noqa: B009  # typed as a tensor

    def __enter__(self) -> None:
        if self._guard is not None:
            self._own["generate"] = self._guard

    def __exit__(self, *_: object) -> None:
        if self._was is not None:
            self._own["generate"] = self._was
        elif self._guard is not None:
            self._own.pop("generate", None)


class _Guard:
    def __init__(self, module: nn.Module, generate: Any, is_followed: Callable[[], bool]):
        update_wrapper(self, generate)
        self._module, self._generate, self._is_followed = module, generate, is_followed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        if self._is_followed():
            check(self._module, self._generate, args, kwargs)
        return self._generate(*args, **kwargs)


def check(module: Any, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ArgumentError if a call of `generate` asks for what tracking cannot follow.

    A setting may be an argument, stand in a config that is given, or in the model's own; the first that has it decides.
    """
    given = inspect.signature(generate).bind(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    places = (
        ("argument", given),
        ("generation_config", _settings(given.get("generation_config"))),
        ("the model's own generation_config", _settings(module.generation_config)),
    )

    def asked(name: str) -> tuple[Any, str]:
        found = ((settings[name], place) for place, settings in places if settings.get(name) is not None)
        return next(found, (None, ""))

    refused: dict[str, Callable[[Any], bool]] = {
        "num_beams": lambda value: value > 1,
        "num_beam_groups": lambda value: value > 1,
        "constraints": lambda _: True,
        "force_words_ids": lambda _: True,
        "penalty_alpha": lambda value: value > 0,
        "guidance_scale": lambda value: value != 1,
        "assistant_early_exit": lambda _: True,
        "custom_generate": lambda _: True,
    }
    for name, is_refused in refused.items():
        value, place = asked(name)
        if value is not None and is_refused(value):
            raise ArgumentError(
                f"{name} is {value!r} ({place}); tracked codes and chosen positions are those of the rows that run, "
                f"which are not those of the result then; {_WAY_OUT}"
            )


def _settings(config: Any) -> dict[str, Any]:
    return {} if config is None else vars(config)
