"""SAEs attached to a model that runs: what a context has asked for, done at the hook points of its forwards.

Hooks belong to a model and are shared by all threads, so every request is a frame on a stack of its own context (a
thread, or a coroutine's task), and a hook acts for the frames of the context that runs the forward. The hooks are set
for the first frame of all contexts and gone after the last.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from sae_census.compute.effects.edits import Edit, ErrorTerm, edit
from sae_census.compute.effects.positions import Passing, Selector
from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ArgumentError
from sae_census.io.model.following import Past, Sequences, past_of
from sae_census.io.model.hooks import layout_of
from sae_census.io.model.interventions import Hook, Interventions
from sae_census.io.model.unfollowed import Unfollowed
from sae_census.types import HookPoint

When = Literal["before", "after"]
_log = getLogger(__name__)


class SteeredPositions(NamedTuple):
    """What steering did at one hook point: tokens of all rows and forwards, padding included."""

    touched: int
    """Tokens whose activation was changed."""
    seen: int
    """Tokens that passed."""


class Tracking:
    """The wish to collect codes."""

    def __init__(self, when: When):
        self.when = when
        """before: of the activation as it arrives at the hook point; after: as it leaves."""
        self.sequences = Sequences()
        """The codes by hook point; of the last forward and those that it went on from."""
        self.runner: threading.Thread | None = None
        """Who runs the last forward."""


@dataclass(slots=True, eq=False)
class Steering:
    """The wish to edit codes."""

    edits: dict[str, tuple[Edit, ...]]
    error_term: ErrorTerm
    positions: dict[str, SteeredPositions]
    selector: Selector
    """Of the tokens that may be edited."""
    on_sink: Callable[[str, int], None] = lambda name, position: None
    """Hears the hook point and the position of attention sinks that were changed."""


Frame = Tracking | Steering


@dataclass(frozen=True, slots=True)
class _Here:
    """The frames of one context, outermost first, and the last of each kind that it entered or left."""

    frames: tuple[Frame, ...] = ()
    tracking: Tracking | None = None
    steering: Steering | None = None

    def noting(self, frame: Frame) -> "_Here":
        """The same, with this frame as the last of its kind."""
        if isinstance(frame, Tracking):
            return replace(self, tracking=frame)
        return replace(self, steering=frame)


_HERE: ContextVar["WeakKeyDictionary[Attachment, _Here]"] = ContextVar("attached")
_NOBODY: "WeakKeyDictionary[Attachment, _Here]" = WeakKeyDictionary()


_NOTHING = Past(None, 0)


class _Thread(threading.local):
    """What a thread did last, for notebooks that give every cell a context of its own; and its forward that runs."""

    def __init__(self) -> None:
        self.last = _Here()
        self.offered = self.past = _NOTHING
        self.given: dict[str, Tensor] = {}
        self.passed: set[str] = set()


class _Entry(NamedTuple):
    """Who entered a block, and who was there then."""

    thread: threading.Thread
    alive: "WeakSet[threading.Thread]"


class Attachment:
    """One SAE at each of some hook points of a model."""

    def __init__(self, model: nn.Module, saes: Mapping[str, SparseAutoencoder], points: Mapping[str, HookPoint]):
        """Prepare; no hook is set yet.

        Raises:
            ConfigError: if the model is not supported, or has no such hook point.
        """
        self.saes = dict(saes)
        self._blocks, taps = layout_of(model)
        self._callers = [module for module in model.modules() if self._calls_blocks(module)]
        functions = {points[name]: partial(self._pass, name) for name in saes}
        self._interventions = Interventions(self._blocks, taps, functions)
        self._lock = threading.Lock()
        self._hooks = ExitStack()
        self._open: dict[Frame, _Entry] = {}
        self._thread = _Thread()
        self._has_warned = False

    @contextmanager
    def inside(self, frame: Frame) -> Iterator[None]:
        """Do what the frame asks for in every forward of this context inside the block."""
        entry = _Entry(threading.current_thread(), WeakSet(threading.enumerate()))
        with self._lock:
            if not self._open:
                self._attach()
            self._open[frame] = entry
        self._note(frame, frames=(*self._here.frames, frame))
        try:
            yield
        finally:
            self._note(frame, frames=tuple(other for other in self._here.frames if other is not frame))
            if isinstance(frame, Tracking):
                frame.sequences.close()
            with self._lock:
                del self._open[frame]
                if not self._open:
                    self._hooks.close()

    @property
    def tracking(self) -> Tracking | None:
        """The innermost tracking of this context, else its last."""
        inside = [frame for frame in self._here.frames if isinstance(frame, Tracking)]
        return inside[-1] if inside else self._here.tracking or self._thread.last.tracking

    @property
    def steering(self) -> Steering | None:
        """The innermost steering of this context, else its last."""
        inside = [frame for frame in self._here.frames if isinstance(frame, Steering)]
        return inside[-1] if inside else self._here.steering or self._thread.last.steering

    @property
    def follows_rows(self) -> bool:
        """Whether this context collects codes now, or edits by what it saw of each row."""
        return any(isinstance(frame, Tracking) or frame.selector.follows_rows for frame in self._here.frames)

    def forget(self) -> None:
        """Drop the codes that this context has collected."""
        for frame in self._here.frames:
            if isinstance(frame, Tracking):
                frame.sequences.clear()
        self._here = replace(self._here, tracking=None)
        self._thread.last = replace(self._thread.last, tracking=None)

    @property
    def _here(self) -> _Here:
        return _HERE.get(_NOBODY).get(self, _Here())

    @_here.setter
    def _here(self, here: _Here) -> None:
        # a new mapping each time: contexts that were copied from this one must not see what happens to it
        _HERE.set(WeakKeyDictionary({**_HERE.get(_NOBODY), self: here}))

    def _note(self, frame: Frame, frames: tuple[Frame, ...]) -> None:
        self._here = replace(self._here.noting(frame), frames=frames)
        self._thread.last = self._thread.last.noting(frame)

    def _attach(self) -> None:
        with ExitStack() as stack:
            for module in self._callers:
                stack.callback(module.register_forward_pre_hook(Hook(self._enter), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(Hook(self._leave)).remove)
                stack.enter_context(Unfollowed(module, lambda: self.follows_rows))
            # before the hooks of the interventions: one may read the very same tensor
            first = self._blocks[0].register_forward_pre_hook(Hook(self._begin), with_kwargs=True)
            stack.callback(first.remove)
            stack.enter_context(self._interventions)
            self._hooks = stack.pop_all()

    def _calls_blocks(self, module: nn.Module) -> bool:
        """Whether the blocks run inside the forward of a module."""
        within = any(one is self._blocks for one in module.modules())
        return within and not isinstance(module, nn.ModuleList | nn.ModuleDict)

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """A module that runs the blocks is called."""
        self._thread.passed = set()
        if self._here.frames:
            past = past_of(args, kwargs or {})
            self._thread.offered = self._thread.offered if past.cache is None else past
            self._thread.given |= _given(args, kwargs or {})

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """A forward is over: what should have been read and edited in it, was."""
        frames = self._here.frames
        asked = [name for name in self.saes if any(_concerns(frame, name) for frame in frames)]
        missed = [name for name in asked if name not in self._thread.passed]
        if missed:
            raise ArgumentError(
                f"a forward of {type(module).__name__} did not pass {', '.join(missed)}, so nothing was read or edited "
                "there; models that run as one graph (CUDA graphs, torch.jit, torch.export) or in part (early exit) "
                "cannot be tracked or steered: use the model as it was before"
            )

    def _begin(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """The first block of a forward runs."""
        frames = self._here.frames
        if not frames:
            self._check_thread()
        if _in_backward():
            return
        self._thread.passed = set()
        past = past_of(args, kwargs or {}) if frames else _NOTHING
        self._thread.past = self._thread.offered if past.cache is None else past
        passing = Passing(past=self._thread.past.num_tokens, **{"ids": None, **self._thread.given})
        self._thread.offered, self._thread.given = _NOTHING, {}
        for frame in frames:
            if isinstance(frame, Tracking):
                frame.runner = threading.current_thread()
                frame.sequences.begin(self._thread.past)
            else:
                frame.selector.begin(passing)

    def _check_thread(self) -> None:
        """A thread without frames runs the model; raise if it began inside a block, which it might count itself to."""
        here = threading.current_thread()
        with self._lock:
            entries = list(self._open.values())
        if not entries or any(entry.thread is here for entry in entries):  # another coroutine, or another context
            return
        if _in_backward() or any(here not in entry.alive for entry in entries):
            raise ArgumentError(
                f"thread {here.name} began while another tracks or steers this model, and would run it plain; to take "
                "the block along, start it with contextvars.copy_context().run (as asyncio.to_thread does); to run "
                "plain, enter `with model.steering_enabled({})` in the thread"
            )
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "thread %s runs the model plain while another tracks or steers it; blocks concern the thread that "
                "entered them, and those that it starts with contextvars.copy_context().run",
                here.name,
            )

    def _pass(self, name: str, x: Tensor) -> Tensor | None:
        """What happens to the tensor at a hook point on its way."""
        frames = [frame for frame in self._here.frames if _concerns(frame, name)]
        if not frames:
            return None
        here = self._thread
        if _in_backward():  # a checkpointed block runs once more: edited as before, and already read
            frames = [frame for frame in frames if isinstance(frame, Steering)]
        elif name in here.passed and any(isinstance(frame, Tracking) for frame in frames):
            raise ArgumentError(
                f"{name} ran twice in one forward; call the model or the module that owns its blocks, since a forward "
                "that leaves out the first block does not say where it begins"
            )
        here.passed.add(name)
        sae = self._sae(name, x)
        with torch.autocast(x.device.type, enabled=False):  # codes are float32, whatever the model computes in
            return _serve(name, sae, x, frames, here.past)

    def _sae(self, name: str, x: Tensor) -> SparseAutoencoder:
        sae = self.saes[name]
        if sae.w_enc.device != x.device:
            sae = self.saes[name] = sae.to(x.device)
        if sae.width != x.shape[-1]:
            raise ArgumentError(
                f"the SAE at {name} is {sae.width} wide, but the activations are {x.shape[-1]} wide; is this the SAE "
                "of another model or hook point?"
            )
        return sae


def _concerns(frame: Frame, name: str) -> bool:
    return isinstance(frame, Tracking) or name in frame.edits


def _in_backward() -> bool:
    """Whether autograd runs the forward, to compute again what it did not keep."""
    return torch._C._current_graph_task_id() != -1


def _serve(name: str, sae: SparseAutoencoder, x: Tensor, frames: Sequence[Frame], past: Past) -> Tensor | None:
    tracking = [frame for frame in frames if isinstance(frame, Tracking)]
    steering = [frame for frame in frames if isinstance(frame, Steering)]
    _track(name, sae, x, [frame for frame in tracking if frame.when == "before"], past)
    new = _steer(name, sae, x, steering)
    _track(name, sae, x if new is None else new, [frame for frame in tracking if frame.when == "after"], past)
    return new


def _track(name: str, sae: SparseAutoencoder, x: Tensor, frames: list[Tracking], past: Past) -> None:
    if not frames:
        return
    with torch.no_grad():
        if not torch.isfinite(x).all():
            raise ArgumentError(f"activations at {name} are NaN or infinite; try the model in bfloat16 or float32")
        codes = sae.encode(x)
    num_rows, num_positions = x.shape[:2]
    for frame in frames:
        if frame.runner not in (None, threading.current_thread()):
            raise ArgumentError("two threads run forwards in one tracking block; give each a block of its own")
        frame.sequences.track(name, sae.num_features, past).extend(codes, num_rows, num_positions, past.num_tokens)


def _steer(name: str, sae: SparseAutoencoder, x: Tensor, frames: list[Steering]) -> Tensor | None:
    if not frames:
        return None
    chosen = [frame.selector.choose(name, x) for frame in frames]
    mine = torch.stack([one.where.flatten() for one in chosen])
    new, touched = x.flatten(0, 1), torch.zeros_like(mine[0])
    for acting in mine.unique(dim=1).unbind(dim=1):  # tokens that the same frames may edit
        active = [frame for frame, acts in zip(frames, acting.tolist(), strict=True) if acts]
        if not active:
            continue
        edits = [one for frame in active for one in frame.edits[name]]
        error_term: ErrorTerm = "drop" if any(frame.error_term == "drop" for frame in active) else "keep"
        edited = edit(sae, new, edits, where=(mine == acting[:, None]).all(dim=0), error_term=error_term)
        new, touched = edited.x, touched | edited.touched
    for frame, one in zip(frames, chosen, strict=True):
        changed = touched & one.where.flatten()
        before = frame.positions[name]
        frame.positions[name] = SteeredPositions(before.touched + int(changed.sum()), before.seen + changed.numel())
        sinks = one.sinks & changed.view(x.shape[:2]).cpu().numpy()
        if sinks.any():
            frame.on_sink(name, frame.selector.first_place(sinks))
    return new.view(x.shape) if touched.any() else None


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the arguments of a model say about its tokens: fields of a `Passing`."""
    found = {}
    ids = kwargs.get("input_ids", args[0] if args else None)
    if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
        found["ids"] = ids
    for name in ("attention_mask", "position_ids"):
        if isinstance(value := kwargs.get(name), Tensor):
            found[name] = value
    return found
