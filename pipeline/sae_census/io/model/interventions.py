"""Hooks that write: the tensors at some hook points pass through functions and may come back changed.

The table of taps is that of `sae_census.io.model.hooks`, whose captures only read; what observes imports only those.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sae_census.errors import ArgumentError
from sae_census.io.model.eager import eager
from sae_census.io.model.families import Tap
from sae_census.io.model.hooks import check_point
from sae_census.types import HookPoint, Stream

Function = Callable[[Tensor], Tensor | None]
"""Takes the tensor (B, T, width) at a hook point; returns its replacement, or None to leave it as it is."""


class Hook:
    """A hook that a copy of the model must not carry: nobody would take it off there."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function does."""
        return self._function(*args, **kwargs)

    def __deepcopy__(self, _memo: dict[int, Any]) -> "Hook":
        raise ArgumentError("a model cannot be copied or saved while it is tracked or steered; leave the block first")

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return self.__deepcopy__({})


class Interventions:
    """Passes every forward of a model through functions at hook points, inside a `with` block.

    The hooks are gone after the block, also after an exception. Other arguments and the other elements of a
    tuple pass unchanged. The functions are called in the thread that runs the forward. Models that were compiled run
    module by module as long (`sae_census.io.model.eager`).

    A write at resid_mid reaches the whole residual stream: the tap there is the input of the second norm, which
    feeds only the MLP, so the same change is added to the output of the block.
    """

    def __init__(self, blocks: nn.ModuleList, taps: dict[Stream, Tap], functions: Mapping[HookPoint, Function]):
        """Prepare the hooks; none is set yet.

        Raises:
            ConfigError: if a layer is out of range or the family lacks the stream.
        """
        for point in functions:
            check_point(point, taps, len(blocks))
        self._blocks, self._taps, self._functions = blocks, taps, dict(functions)
        self._detours: dict[
            tuple[int, int], Tensor
        ] = {}  # by thread and layer, from the second norm to the block's end
        self._stack = ExitStack()

    def __enter__(self) -> "Interventions":
        with ExitStack() as stack:
            stack.enter_context(eager(self._blocks.modules()))
            for point, function in self._functions.items():
                path, side = self._taps[point.stream]
                block = self._blocks[point.layer]
                module = block.get_submodule(path)
                if point.stream == "resid_mid":
                    hook = self._write_in(self._leaving(point.layer, function))
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                    # first of the block's hooks: those at resid_post must see the change
                    hook = self._write_out(self._arriving(point.layer))
                    stack.callback(block.register_forward_hook(hook, prepend=True).remove)
                elif side == "in":
                    hook = self._write_in(function)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                else:
                    stack.callback(module.register_forward_hook(self._write_out(function)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._detours.clear()

    def _write_in(self, function: Function) -> Any:
        # torch forgets that a hook wants kwargs a moment before it forgets the hook: in another thread it may
        # still be called once without them, where it has nothing to do.
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if args:
                new = function(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = function(kwargs["hidden_states"]) if kwargs else None
            return None if new is None else (args, (kwargs or {}) | {"hidden_states": new})

        return Hook(hook)

    def _write_out(self, function: Function) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            new = function(output[0] if is_tuple else output)
            return None if new is None else (new, *output[1:]) if is_tuple else new

        return Hook(hook)

    def _leaving(self, layer: int, function: Function) -> Function:
        def leave(x: Tensor) -> Tensor | None:
            key = (threading.get_ident(), layer)
            self._detours.pop(key, None)
            new = function(x)
            if new is not None:
                wide = torch.promote_types(x.dtype, torch.float32)
                self._detours[key] = new.to(wide) - x.to(wide)
            return new

        return leave

    def _arriving(self, layer: int) -> Function:
        def arrive(x: Tensor) -> Tensor | None:
            change = self._detours.pop((threading.get_ident(), layer), None)
            return None if change is None else (x + change).to(x.dtype)

        return arrive
