"""A language model with SAEs attached: follow features while it runs, and steer it by editing their codes.

Both are context managers around ordinary forwards or `generate`. They nest in any order and concern only the context
that entered them (a thread, or a task of asyncio and those that it starts). Outside, the wrapper is the model, and no
hook is set.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from logging import getLogger
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn

from sae_census.compute.effects.edits import Edit, EditLike, ErrorTerm, Mode, read_edits
from sae_census.compute.effects.positions import Positions, Selector, read_positions
from sae_census.compute.effects.tracks import TopFeatures
from sae_census.compute.numbers.sae import SparseAutoencoder
from sae_census.errors import ArgumentError, ConfigError
from sae_census.io.checkpoints.nanochat import canonical
from sae_census.io.model.attachment import Attachment, SteeredPositions, Steering, Tracking, When
from sae_census.io.model.hooks import max_positions
from sae_census.types import HookPoint

SteeringConfig = Mapping[str, EditLike | Sequence[EditLike]]

_log = getLogger(__name__)


class InterpretableModel(nn.Module):
    """A model whose features can be read and edited while it runs.

    >>> input_ids = tokenizer("river water", return_tensors="pt").input_ids
    >>> watched = InterpretableModel(model.inner, {"blocks.1.hook_resid_post": sae})
    >>> with watched.interpretation_enabled():
    ...     output = watched(input_ids)
    >>> codes = watched.get_active_features()["blocks.1.hook_resid_post"]
    >>> tuple(codes.shape) == (*input_ids.shape, 96)
    True
    >>> steered = watched.steer(input_ids, feature_id=("blocks.1.hook_resid_post", 42), strength=2.0)
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[str, Any],
        device: str | torch.device | None = None,
    ):
        """Wrap a model; nothing is attached to it yet.

        Args:
            model: a decoder of transformers of any supported family, also inside PEFT's wrappers, or nanochat's own
                GPT.
            saes: one SAE for each hook point, named as in `blocks.10.hook_resid_post`: as from `load_saes` or
                `load_sae`, in canonical form, or an object of nanochat's SAE add-on.
            device: where the SAEs are put; by default with the model. They follow the activations.

        Raises:
            ArgumentError: if the model is not supported or has no such hook point; also a ValueError.
        """
        super().__init__()
        self.model = model
        self._has_warned = False
        self._attach({str(name): canonical(sae) for name, sae in saes.items()}, device)

    def _attach(self, saes: Mapping[str, SparseAutoencoder], device: str | torch.device | None) -> None:
        points = {name: _parse(name) for name in saes}
        if len(set(points.values())) < len(points):
            raise ArgumentError(f"two of the SAEs {', '.join(points)} read the same hook point; expected one each")
        where = torch.device(device) if device is not None else self.device
        if where.type != "meta":  # weights that are kept elsewhere until they are needed
            saes = {name: sae.to(where) for name, sae in saes.items()}
        try:
            self._attachment = Attachment(self.model, saes, points)
        except ConfigError as error:
            raise ArgumentError(str(error)) from error

    def __getattr__(self, name: str) -> Any:
        """What the wrapper has not is the model's: `config`, `dtype`, `generation_config`, `save_pretrained`, …"""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("_attachment"):
                raise
            return getattr(self.model, name)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file holds: the model and the SAEs, not what was tracked.

        Inside a block the model's hooks refuse to be copied.
        """
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_attachment"} | {"saes": self.saes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach the SAEs to the copied model."""
        state = dict(state)
        saes = state.pop("saes")
        super().__setstate__(state)
        self._attach(saes, next((sae.w_enc.device for sae in saes.values()), None))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return _device_of(self.model)

    @property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """The SAEs by hook point."""
        return self._attachment.saes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward.

        Raises:
            ArgumentError: if the input is longer than the positions that the model has.
        """
        self._check_length(args, kwargs)
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, tracked and steered like any forward.

        Raises:
            ArgumentError: if beams, or other ways to generate whose result is not the rows that ran, are asked for
                while features are tracked, or if the prompt is longer than the positions that the model has.
        """
        self._check_length(args, kwargs)
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]  # nn.Module types attributes as tensors

    @contextmanager
    def interpretation_enabled(self, *, when: When = "before") -> Iterator["InterpretableModel"]:
        """Collect the codes of every SAE; read them with `get_active_features`, also after the block.

        A forward that goes on from a cache extends what was collected; any other replaces it.

        Args:
            when: before: codes of the activation as it arrives at the hook point; after: as it leaves, edits of
                this hook point included.
        """
        if when not in get_args(When):
            raise ArgumentError(f"when is {when!r}; expected {' or '.join(get_args(When))}")
        with self._attachment.inside(Tracking(when)):
            yield self

    @contextmanager
    def steering_enabled(
        self, steering_config: SteeringConfig, *, error_term: ErrorTerm = "keep", positions: str | Positions = "all"
    ) -> Iterator["InterpretableModel"]:
        """Edit codes at every position of every forward, or at chosen ones.

        All edits of a hook point, those of outer blocks first, start from the codes of the activation as it
        arrives; several edits of one feature are applied in order.

        Args:
            steering_config: for each hook point an edit or several; (feature, strength) scales, and
                (feature, strength, mode) may also add or set.
            error_term: keep changes activations only along the decoder rows of edited features; drop puts the
                SAE's reconstruction in their place.
            positions: all; counted: all but padding, the BOS, EOS and padding ids of the model's config, and attention
                sinks (for them see `Selector`); prompt: the tokens of the forward that others go on from; generated:
                those of the others; ranges such as "3:10" or "0:1,5:", counted from a row's first real token; or
                `Positions`.

        Raises:
            ArgumentError: if a hook point has no SAE, or an edit no such feature or a value that is not finite.
        """
        if error_term not in get_args(ErrorTerm):
            raise ArgumentError(f"error_term is {error_term!r}; expected {' or '.join(get_args(ErrorTerm))}")
        edits: dict[str, tuple[Edit, ...]] = {}
        for hook_point, given in steering_config.items():
            name = self._name_of(hook_point)
            if name is None:
                raise ArgumentError(f"No SAE for hook point: {hook_point}")
            if name in edits:
                raise ArgumentError(f"steering names {name} twice; give its edits as one list")
            try:
                edits[name] = read_edits(given, self.saes[name].num_features)
            except ArgumentError as error:
                raise ArgumentError(f"steering at {name}: {error}") from error
        where = read_positions(positions)
        if where is not positions:
            where = replace(where, special_ids=_special_ids(self.model))
        nothing_yet = dict.fromkeys(edits, SteeredPositions(0, 0))
        frame = Steering(edits, error_term, nothing_yet, Selector(where), self._say_sink)
        with self._attachment.inside(frame):
            yield self
        _say_if_idle(frame)

    def steer(
        self,
        input_ids: Tensor,
        feature_id: tuple[str, int],
        strength: float,
        *,
        mode: Mode = "scale",
        error_term: ErrorTerm = "keep",
        positions: str | Positions = "all",
        **kwargs: Any,
    ) -> Any:
        """One forward with one feature edited.

        Args:
            input_ids: (B, T).
            feature_id: hook point and feature.
            strength: scale: the new code is strength x code; add: code + strength; set: strength.
            mode: of the edit.
            error_term: as in `steering_enabled`.
            positions: as there.
            kwargs: go to the model.

        Returns:
            The output of the model.
        """
        hook_point, feature = feature_id
        edits: SteeringConfig = {hook_point: (feature, strength, mode)}
        with self.steering_enabled(edits, error_term=error_term, positions=positions):
            return self(input_ids, **kwargs)

    @overload
    def get_active_features(self, hook_point: str | None = None, top_k: None = None) -> dict[str, Tensor]: ...

    @overload
    def get_active_features(self, hook_point: str | None, top_k: int) -> dict[str, TopFeatures]: ...

    @overload
    def get_active_features(self, hook_point: str | None = None, *, top_k: int) -> dict[str, TopFeatures]: ...

    def get_active_features(
        self, hook_point: str | None = None, top_k: int | None = None
    ) -> dict[str, Tensor] | dict[str, TopFeatures]:
        """What this context (else its thread) tracked last, by hook point.

        Args:
            hook_point: only this one.
            top_k: only the strongest features of every token, as (indices, values), each (B, T, min(top_k, F)).

        Returns:
            Without `top_k`, sparse tensors (B, T, F) of the positive codes, on the CPU.

        Raises:
            RuntimeError: if nothing was ever tracked.
            ArgumentError: if nothing was tracked at this hook point.
        """
        tracking = self._attachment.tracking
        if tracking is None:
            raise RuntimeError("No features available. Use interpretation_enabled() context manager.")
        tracks = tracking.sequences.read()
        if hook_point is not None:
            name = self._name_of(hook_point)
            if name not in tracks:
                raise ArgumentError(f"No features for hook point: {hook_point}")
            tracks = {name: tracks[name]}
        if top_k is None:
            return {name: track.sparse() for name, track in tracks.items()}
        if top_k < 1:
            raise ArgumentError(f"top_k is {top_k}; expected at least 1")
        return {name: track.top(top_k) for name, track in tracks.items()}

    def _name_of(self, hook_point: object) -> str | None:
        """How the SAEs name a hook point that may be spelled otherwise; None if none is there."""
        given = str(hook_point)
        if given in self.saes:
            return given
        with suppress(ConfigError):
            point = HookPoint.parse(given)
            return next((name for name in self.saes if _parse(name) == point), None)
        return None

    def _check_length(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse an input for which the model has no positions, before it fails somewhere inside."""
        most = max_positions(self.model)
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs", kwargs.get("inputs_embeds")))
        if most and isinstance(given, Tensor) and given.ndim > 1 and given.shape[1] > most:
            raise ArgumentError(
                f"the input has {given.shape[1]} tokens, but the model has {most} positions; give a shorter one"
            )

    def clear_active_features(self) -> None:
        """Forget what this context tracked."""
        self._attachment.forget()

    def get_steered_positions(self) -> dict[str, SteeredPositions]:
        """How many tokens the steering of this context touched and saw, by hook point.

        Of the block that it is in, else of the last one.

        Raises:
            RuntimeError: if nothing was ever steered.
        """
        steering = self._attachment.steering
        if steering is None:
            raise RuntimeError("Nothing was steered. Use steering_enabled() context manager.")
        return dict(steering.positions)

    def get_left_out_positions(self) -> dict[str, dict[str, int]]:
        """How many tokens the steering of this thread could not touch, by hook point and the rule that left them out.

        Of the block that it is in, else of the last one. The rules are padding, special_tokens, first_positions,
        positions (for prompt, generated and ranges: those that were not chosen), max_norm_ratio and attention_sinks;
        a token stands under the first that fits.

        Raises:
            RuntimeError: if nothing was ever steered.
        """
        steering = self._attachment.steering
        if steering is None:
            raise RuntimeError("Nothing was steered. Use steering_enabled() context manager.")
        return {name: dict(steering.selector.left_out.get(name, {})) for name in steering.positions}

    def _say_sink(self, name: str, position: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "steering at %s changes an attention sink, the first at position %d: codes there can be a hundred "
                "times larger than elsewhere, and an edit of one may rewrite all that follows; positions=counted "
                "leaves sinks out (said once)",
                name,
                position,
            )


def _parse(name: str) -> HookPoint:
    try:
        return HookPoint.parse(name)
    except ConfigError as error:
        block = re.fullmatch(r"blocks\.\d+\.(.*)", name)
        what = f"Unknown hook type: {block[1]}" if block else f"Invalid hook point: {name}"
        raise ArgumentError(f"{what} ({error})") from error


def _device_of(model: nn.Module) -> torch.device:
    get_device = getattr(model, "get_device", None)  # nanochat's GPT says it itself
    return torch.device(get_device()) if get_device is not None else next(model.parameters()).device


def _special_ids(model: nn.Module) -> tuple[int, ...]:
    """The BOS, EOS and padding ids that the configs of a model name."""
    found: set[int] = set()
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(config, name, None)
            found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return tuple(sorted(found))


def _why_idle(frame: Steering, name: str, seen: int) -> str:
    left_out: Mapping[str, int] = frame.selector.left_out.get(name, {})
    if sum(left_out.values()) == seen:
        return "all were left out (" + ", ".join(f"{n} {rule}" for rule, n in left_out.items()) + ")"
    return (
        "at all of them the edits leave the codes as they are (scaling cannot switch on a silent feature; mode add or "
        "set can)"
    )


def _say_if_idle(frame: Steering) -> None:
    for name, positions in frame.positions.items():
        if positions.touched:
            continue
        what = (
            f"none of {positions.seen} positions: {_why_idle(frame, name, positions.seen)}"
            if positions.seen
            else "nothing: no forward of this model ran in this thread inside the block"
        )
        _log.warning("steering at %s touched %s", name, what)
