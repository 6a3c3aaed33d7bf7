"""Hooks act only where modules are called one by one; compiled code passes over those that came after it.

`torch.compile` does not look at a model's hooks again once it has compiled it: what was compiled before a hook was
set goes on without it, and what is compiled while it is set keeps it for good. So nothing is compiled, and nothing
that is compiled runs, while a hook of ours is set.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from sae_census.errors import ArgumentError


class _Stance:
    """The compiler's stance, which is one for all threads; ours from the first that needs it to the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._restore = ExitStack()

    def enter(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._restore.enter_context(torch.compiler.set_stance("force_eager"))
            self._num_inside += 1

    def leave(self) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._restore.close()


_stance = _Stance()


@contextmanager
def eager(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, what `torch.compile` has compiled runs module by module, in every thread.

    Args:
        modules: those that carry hooks.

    Raises:
        ArgumentError: if one of them was traced or scripted by `torch.jit`, whose code never calls hooks.
    """
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"{module.original_name} was compiled by torch.jit, and such code never calls hooks; give the model as "
                "it was before torch.jit.trace or torch.jit.script"
            )
    _stance.enter()
    try:
        yield
    finally:
        _stance.leave()
