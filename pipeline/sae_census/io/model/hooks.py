"""The decoder blocks of a loaded model, and read-only captures of its streams that stop the forward early.

Which tensor is which stream is known by the family's record in `families`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sae_census.errors import ConfigError
from sae_census.io.model.eager import eager
from sae_census.io.model.families import FAMILIES, NANOCHAT_GPT, RESIDUAL, Tap, streams_of
from sae_census.types import HookPoint, Stream


def layout_of(model: nn.Module) -> tuple[nn.ModuleList, dict[Stream, Tap]]:
    """The decoder blocks and the streams of a loaded model: one of transformers, or nanochat's own GPT.

    Raises:
        ConfigError: if it is neither, or its family is not supported.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        text, base = config.get_text_config(), getattr(model, "base_model", model)
        return find_blocks(base, text.num_hidden_layers), streams_of(text)
    blocks = getattr(getattr(model, "transformer", None), "h", None)
    if isinstance(blocks, nn.ModuleList):
        return blocks, NANOCHAT_GPT
    raise ConfigError(f"{type(model).__name__} is not supported; expected a decoder of transformers, or nanochat's GPT")


def find_blocks(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The model's decoder blocks: the one ModuleList of that length outside any vision tower.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and "vision" not in name
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ConfigError(f"expected one list of {num_layers} decoder blocks in the model, found {names}")
    return found[0][1]


def check_point(point: HookPoint, taps: dict[Stream, Tap], num_layers: int) -> None:
    """Raises ConfigError if a model of these streams and layers has no such hook point."""
    if not 0 <= point.layer < num_layers:
        raise ConfigError(
            f"hook point {point} asks for layer {point.layer}, but the model has layers 0 to {num_layers - 1}"
        )
    if point.stream not in taps:
        raise ConfigError(f"hook point {point}: this model family has no {point.stream}; it has {', '.join(taps)}")


class _Stop(Exception):  # noqa: N818  # a signal, not an error
    """Raised by the deepest hook: nothing after it is needed."""


class Captures:
    """Reads the tensors at some hook points of one forward pass and stops the pass after the deepest.

    Use as a context manager around calls of `run`. Hooks only read; they are gone after the block, also
    after an exception.
    """

    def __init__(self, blocks: nn.ModuleList, taps: dict[Stream, Tap], points: Iterable[HookPoint]):
        self._points = sorted(set(points))
        for point in self._points:
            check_point(point, taps, len(blocks))
        self._blocks, self._taps = blocks, taps
        self._missing: set[HookPoint] = set()
        self._whole = False
        self._got: dict[HookPoint, Tensor] = {}
        self._handles: list[Any] = []
        self._eager = contextlib.ExitStack()

    def __enter__(self) -> "Captures":
        self._eager.enter_context(eager(self._blocks.modules()))
        taps = [(point, *self._taps[point.stream]) for point in self._points]
        modules = [self._blocks[point.layer].get_submodule(path) for point, path, _ in taps]
        for (point, _, side), module in zip(taps, modules, strict=True):
            if side == "in":
                hook = module.register_forward_pre_hook(self._pre_hook(point), with_kwargs=True)
            else:
                hook = module.register_forward_hook(self._post_hook(point))
            self._handles.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._eager.close()

    def _keep(self, point: HookPoint, value: Any) -> None:
        self._got[point] = value[0] if isinstance(value, tuple) else value
        self._missing.discard(point)
        if not self._missing and not self._whole:
            raise _Stop

    def _pre_hook(self, point: HookPoint) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(point, args[0] if args else kwargs["hidden_states"])

        return hook

    def _post_hook(self, point: HookPoint) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._keep(point, output)

        return hook

    def run(self, model: nn.Module, input_ids: Tensor) -> dict[HookPoint, Tensor]:
        """One forward pass over `input_ids` (B, T); the tensors (B, T, width) by hook point.

        Contexts are right-padded and the attention is causal, so no attention mask is needed: what stands
        at padded positions never reaches a real one.
        """
        self._got, self._missing, self._whole = {}, set(self._points), False
        with contextlib.suppress(_Stop), torch.inference_mode():
            model(input_ids=input_ids, use_cache=False)
        self._check()
        return self._got

    def run_whole(self, model: nn.Module, input_ids: Tensor) -> tuple[dict[HookPoint, Tensor], Tensor]:
        """As `run`, but to the end of the model: also its last hidden state (B, T, D), normed."""
        self._got, self._missing, self._whole = {}, set(self._points), True
        with torch.inference_mode():
            output = model(input_ids=input_ids, use_cache=False)
        self._check()
        return self._got, output.last_hidden_state

    def _check(self) -> None:
        if self._missing:
            raise ConfigError(
                f"the forward did not pass {', '.join(map(str, sorted(self._missing)))}; models that run as one graph "
                "(CUDA graphs, torch.jit, torch.export) cannot be read: use the model as it was before"
            )


def max_positions(model: nn.Module) -> int:
    """Tokens after which a model fails: it has a table of positions (GPT-2), or of rotations (nanochat's own GPT).

    0 where positions are computed, as in all other families; beyond what they were trained on these go on.
    """
    tables = {family.positions for family in FAMILIES.values() if family.positions}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in tables:
            return module.num_embeddings
    cos = getattr(model, "cos", None)
    return cos.shape[1] if isinstance(cos, Tensor) and cos.ndim == 4 else 0


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a model that has a transformers config.

    Raises:
        ConfigError: if they cannot be told.
    """
    config: Any = model.config
    return find_blocks(model, config.get_text_config().num_hidden_layers)


@contextmanager
def capture_residual(model: nn.Module, layer_idx: int) -> Iterator[dict[str, Tensor]]:
    """While it is entered, every forward pass leaves the block's output (B, T, D) under "h" in the yielded dict.

    The hook only reads, never stops the pass, and is gone after the block, also after an exception.

    Args:
        model: a decoder with a transformers config.
        layer_idx: of the block, from 0 on.

    Returns:
        A context manager that yields the dict: B prompts, T positions, D d_model, in the model's dtype.

    >>> ids = tokenizer("river water", return_tensors="pt").input_ids
    >>> with capture_residual(model.inner, 1) as seen:
    ...     output = model.inner(ids)
    >>> tuple(seen["h"].shape) == (*ids.shape, 32)
    True

    Raises:
        ConfigError: if the model has no such layer.
    """
    blocks = blocks_of(model)
    check_point(HookPoint(layer_idx, "resid_post"), RESIDUAL, len(blocks))
    bucket: dict[str, Tensor] = {}

    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        bucket["h"] = output[0] if isinstance(output, tuple) else output

    with eager(blocks.modules()):
        handle = blocks[layer_idx].register_forward_hook(hook)
        try:
            yield bucket
        finally:
            handle.remove()
