"""SAEs attached to a model that runs: what a thread has asked for, done at the hook points of its forwards.

Hooks belong to a model and are shared by all threads, so every request is a frame on a stack of its own thread, and a
hook acts for the frames of the thread that runs the forward. The hooks are set for the first frame of all threads and
gone after the last.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.compute.edits import Edit, ErrorTerm, edit
from pipeline.compute.positions import Passing, Selector
from pipeline.compute.sae import SparseAutoencoder
from pipeline.compute.tracks import Track
from pipeline.errors import ArgumentError
from pipeline.io.hooks import layout_of
from pipeline.io.interventions import Interventions
from pipeline.types import HookPoint

When = Literal["before", "after"]


class SteeredPositions(NamedTuple):
    """What steering did at one hook point: tokens of all rows and forwards, padding included."""

    touched: int
    """Tokens whose activation was changed."""
    seen: int
    """Tokens that passed."""


@dataclass(slots=True, eq=False)
class Tracking:
    """The wish to collect codes."""

    when: When
    """before: of the activation as it arrives at the hook point; after: as it leaves."""
    tracks: dict[str, Track] = field(default_factory=dict)
    """By hook point; of the last forward and those that went on from its cache."""
    past: int = 0
    """Tokens in the cache of the forward that runs."""


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


class _Thread(threading.local):
    """The frames of one thread, outermost first, and the last of each kind that it entered or left."""

    def __init__(self) -> None:
        self.frames: tuple[Tracking | Steering, ...] = ()
        self.tracking: Tracking | None = None
        self.steering: Steering | None = None


class Attachment:
    """One SAE at each of some hook points of a model."""

    def __init__(self, model: nn.Module, saes: Mapping[str, SparseAutoencoder], points: Mapping[str, HookPoint]):
        """Prepare; no hook is set yet.

        Raises:
            ConfigError: if the model is not supported, or has no such hook point.
        """
        self._root: nn.Module = getattr(model, "base_model", model)
        self.saes = dict(saes)
        blocks, taps = layout_of(model)
        functions = {points[name]: partial(self._pass, name) for name in saes}
        self._interventions = Interventions(blocks, taps, functions)
        self._lock = threading.Lock()
        self._hooks = ExitStack()
        self._num_inside = 0
        self._thread = _Thread()

    @contextmanager
    def inside(self, frame: Tracking | Steering) -> Iterator[None]:
        """Do what the frame asks for in every forward of this thread inside the block."""
        self._note(frame)
        with self._lock:
            if self._num_inside == 0:
                with ExitStack() as stack:
                    stack.callback(self._root.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                    stack.enter_context(self._interventions)
                    self._hooks = stack.pop_all()
            self._num_inside += 1
        self._thread.frames = (*self._thread.frames, frame)
        try:
            yield
        finally:
            self._note(frame)
            self._thread.frames = tuple(other for other in self._thread.frames if other is not frame)
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    self._hooks.close()

    @property
    def tracking(self) -> Tracking | None:
        """The innermost tracking of this thread, else its last."""
        inside = [frame for frame in self._thread.frames if isinstance(frame, Tracking)]
        return inside[-1] if inside else self._thread.tracking

    @property
    def steering(self) -> Steering | None:
        """The innermost steering of this thread, else its last."""
        inside = [frame for frame in self._thread.frames if isinstance(frame, Steering)]
        return inside[-1] if inside else self._thread.steering

    @property
    def is_tracking(self) -> bool:
        """Whether this thread collects codes now."""
        return any(isinstance(frame, Tracking) for frame in self._thread.frames)

    def forget(self) -> None:
        """Drop the codes that this thread has collected."""
        self._thread.tracking = None
        for frame in self._thread.frames:
            if isinstance(frame, Tracking):
                frame.tracks = {}

    def _note(self, frame: Tracking | Steering) -> None:
        if isinstance(frame, Tracking):
            self._thread.tracking = frame
        else:
            self._thread.steering = frame

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        past = _cached_tokens((*args, *(kwargs or {}).values()))
        passing = _passing(past, args, kwargs or {})
        for frame in self._thread.frames:
            if isinstance(frame, Steering):
                frame.selector.begin(passing)
                continue
            frame.past = past
            if past == 0:
                frame.tracks = {}

    def _pass(self, name: str, x: Tensor) -> Tensor | None:
        """What happens to the tensor at a hook point on its way."""
        frames = [frame for frame in self._thread.frames if isinstance(frame, Tracking) or name in frame.edits]
        if not frames:
            return None
        sae = self._sae(name, x)
        with torch.autocast(x.device.type, enabled=False):  # codes are float32, whatever the model computes in
            return _serve(name, sae, x, frames)

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


def _serve(name: str, sae: SparseAutoencoder, x: Tensor, frames: Sequence[Tracking | Steering]) -> Tensor | None:
    tracking = [frame for frame in frames if isinstance(frame, Tracking)]
    steering = [frame for frame in frames if isinstance(frame, Steering)]
    _track(name, sae, x, [frame for frame in tracking if frame.when == "before"])
    new = _steer(name, sae, x, steering)
    _track(name, sae, x if new is None else new, [frame for frame in tracking if frame.when == "after"])
    return new


def _track(name: str, sae: SparseAutoencoder, x: Tensor, frames: list[Tracking]) -> None:
    if not frames:
        return
    with torch.no_grad():
        if not torch.isfinite(x).all():
            raise ArgumentError(f"activations at {name} are NaN or infinite; try the model in bfloat16 or float32")
        codes = sae.encode(x)
    num_rows, num_positions = x.shape[:2]
    for frame in frames:
        if name not in frame.tracks:
            frame.tracks[name] = Track(num_features=sae.num_features, first=frame.past, num_rows=num_rows)
        frame.tracks[name].extend(codes, num_rows, num_positions, frame.past)


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


def _passing(past: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Passing:
    """What the arguments of a forward say about its tokens."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    mask, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
    return Passing(
        past=past,
        ids=ids if is_ids else None,
        attention_mask=mask if isinstance(mask, Tensor) else None,
        position_ids=places if isinstance(places, Tensor) else None,
    )


def _cached_tokens(arguments: Sequence[Any]) -> int:
    """How many tokens the cache among the arguments of a forward holds; of transformers, or of nanochat."""
    for argument in arguments:
        for name in ("get_seq_length", "get_pos"):
            if hasattr(argument, name):
                return int(getattr(argument, name)())
    return 0
