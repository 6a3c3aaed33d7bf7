"""Steer a prompt: the text with and without edits, what happened to the codes, and how far predictions moved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_census.compute.effects.edits import Edit
from sae_census.compute.effects.effects import divergence
from sae_census.compute.effects.positions import Positions, read_positions
from sae_census.config import MasksConfig, SteerConfig
from sae_census.errors import ArgumentError, ConfigError
from sae_census.flows.catalog.reader import Catalog
from sae_census.flows.effects.interpretable import InterpretableModel
from sae_census.io.model import device
from sae_census.io.model.attachment import SteeredPositions
from sae_census.io.model.device import choose_device
from sae_census.io.model.generation import clear_settings
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.model.reader import Reader
from sae_census.types import HookPoint, SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedFeature:
    """A feature that was edited, in one text."""

    site: SiteKey
    edit: Edit
    codes: tuple[float, ...]
    """At every token of the text as it arrives at the hook point, before this edit; 0 where silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A prompt with its continuation."""

    continuation: str
    tokens: tuple[str, ...]
    """Of the prompt and the continuation, the last excepted: no code was computed for that."""
    edited: tuple[EditedFeature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedFeature:
    """A feature whose mean code over the unsteered text differs when the same text is read under steering."""

    site: SiteKey
    feature_id: int
    unsteered: float
    steered: float
    """As activations leave the hook point, edits included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What steering did."""

    prompt: str
    unsteered: Text
    steered: Text
    dtype: str
    """That the model computed in."""
    device: str
    chosen: str
    """Where edits could act, as `positions` of the config."""
    positions: dict[str, SteeredPositions]
    """By hook point, while the steered text was made."""
    left_out: dict[str, dict[str, int]]
    """How many of those could not be touched, by hook point and rule."""
    kl_next: float
    """KL(unsteered || steered), in nats, of the first token after the prompt."""
    kl_mean: float
    """The same, mean over the tokens of the unsteered continuation, each given those before it."""
    changed: tuple[ChangedFeature, ...]
    """The most changed features of every hook point. The first token of the text is left out, since activations
    there are out of range in most models."""


def steer(config: SteerConfig) -> Steering:
    """Continue a prompt with features edited and without, and tell what that did to the codes and predictions.

    Args:
        config: model, SAEs, prompt, edits, and where edits act.

    Returns:
        Both texts with the edited features' codes at every token; how far predictions moved, as KL divergence in nats;
        and the features whose mean code changed most.

    >>> from sae_census import SteerConfig
    >>> config = SteerConfig(
    ...     model={"id": model_dir, "dtype": "float32", "device": "cpu"}, saes=[{"path": sae_dir}],
    ...     prompt="river water", edits=[{"feature": 42, "value": 3.0, "mode": "set"}],
    ...     generate={"max_new_tokens": 3},
    ... )
    >>> done = steer(config)
    >>> done.kl_next > 0, len(done.steered.edited)
    (True, 1)

    Raises:
        UserError: if an edit names no feature, or one that is dead in the catalog, or breaks the model, or the prompt
            has a token that the model does not know.
    """
    device.configure(config.threads, choose_device(config.model.device))
    reader = Reader(config.model, config.saes)
    reader.warn_of_centring()
    sites = _sites(reader)
    edits = _edits(config, sites, reader)
    masks = MasksConfig() if config.catalog.name is None else _check_alive(config, edits, sites, reader)
    clear_settings(reader.model)
    model = InterpretableModel(reader.model.inner, {str(key.hook_point): sae for key, sae in reader.saes.items()})
    start = _prompt_ids(reader.tokenizer, config.prompt)
    reader.model.check_ids(start)
    start = start.to(reader.device)
    where = _positions(config, masks, reader.tokenizer, start.shape[1])
    with torch.no_grad():
        plain, plain_ids = _write(model, reader.tokenizer, start, config, sites, edits)
        with model.steering_enabled(edits, error_term=config.error_term, positions=where):
            steered, _ = _write(model, reader.tokenizer, start, config, sites, edits)
            positions, left_out = model.get_steered_positions(), model.get_left_out_positions()
        kl, changed = _compare(model, plain_ids, config, sites, edits, where)
    first = start.shape[1] - 1
    return Steering(
        prompt=config.prompt,
        unsteered=plain,
        steered=steered,
        dtype=str(reader.model.inner.dtype).removeprefix("torch."),
        device=str(reader.device),
        chosen=config.positions,
        positions=positions,
        left_out=left_out,
        kl_next=float(kl[first]),
        kl_mean=float(kl[first:].mean()),
        changed=changed,
    )


def _sites(reader: Reader) -> dict[str, SiteKey]:
    """The SAE of each hook point."""
    sites: dict[str, SiteKey] = {}
    for key in reader.saes:
        name = str(key.hook_point)
        if name in sites:
            raise ConfigError(f"saes names {sites[name].sae} and {key.sae} at {name}; steering needs one a hook point")
        sites[name] = key
    return sites


def _edits(config: SteerConfig, sites: Mapping[str, SiteKey], reader: Reader) -> dict[str, list[Edit]]:
    edits: dict[str, list[Edit]] = {}
    for one in config.edits:
        if one.hook_point is None and len(sites) > 1:
            raise ConfigError(f"edits[].hook_point is not given; expected one of {', '.join(sites)}")
        name = next(iter(sites)) if one.hook_point is None else str(HookPoint.parse(one.hook_point))
        if name not in sites:
            raise ConfigError(f"edits name {name}, but the SAEs are at {', '.join(sites)}")
        num_features = reader.saes[sites[name]].num_features
        if one.feature >= num_features:
            raise ConfigError(f"{sites[name]} has no feature {one.feature}; expected 0 to {num_features - 1}")
        edits.setdefault(name, []).append(Edit(feature=one.feature, value=one.value, mode=one.mode))
    return edits


def _check_alive(
    config: SteerConfig, edits: Mapping[str, Sequence[Edit]], sites: Mapping[str, SiteKey], reader: Reader
) -> MasksConfig:
    """Refuse features that never fired on the catalog's corpus, since nothing is known of what they do; its masks."""
    catalog = Catalog(config.store.root, config.catalog.name or "", config.catalog.snapshot)
    edited = {sites[name]: reader.loaded[sites[name]] for name in edits}
    catalog.provenance.only(edited).prove_saes(edited)
    for name, several in edits.items():
        site = sites[name]
        for one in several:
            row = catalog.feature(name, site.sae, one.feature)
            if row["dead"] and not config.allow_dead:
                raise ConfigError(
                    f"feature {one.feature} of {site} is dead: it never fired on the {row['tokens_counted']:,} tokens "
                    f"of catalog {config.catalog.name}; set allow_dead=true to steer it all the same"
                )
    return catalog.measure.masks


def _positions(config: SteerConfig, masks: MasksConfig, tokenizer: Tokenizer, num_prompt: int) -> Positions:
    """Where edits act; the end of the prompt is known, so texts that are read at once are edited as they were made."""
    return replace(
        read_positions(config.positions),
        special_ids=tuple(tokenizer.special_ids),
        first_positions=masks.first_positions,
        positions=masks.positions,
        max_norm_ratio=masks.max_norm_ratio,
        num_prompt=num_prompt,
    )


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    ids = tokenizer.with_bos(tokenizer.encode([prompt])[0])
    if not ids:
        raise ConfigError("prompt is empty; expected some text")
    return torch.tensor([ids])


def _write(
    model: InterpretableModel,
    tokenizer: Tokenizer,
    start: Tensor,
    config: SteerConfig,
    sites: Mapping[str, SiteKey],
    edits: Mapping[str, Sequence[Edit]],
) -> tuple[Text, Tensor]:
    """Continue the prompt; the text and its ids (1, T)."""
    how = config.generate
    sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0} if how.temperature else {}
    torch.manual_seed(how.seed)
    with model.interpretation_enabled():
        ids = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=how.max_new_tokens,
            pad_token_id=tokenizer.pad_id,
            **({"do_sample": False} | sampling),
        )
        codes = {name: track.select(0, 0) for name, track in model.get_active_features().items()}
    edited = tuple(
        EditedFeature(site=sites[name], edit=one, codes=tuple(codes[name].select(1, one.feature).to_dense().tolist()))
        for name, several in edits.items()
        for one in several
    )
    words = tokenizer.token_texts([ids[0].tolist()])[0]
    text = Text(
        continuation="".join(words[start.shape[1] :]),
        tokens=tuple(words[:-1]),
        edited=edited,
    )
    return text, ids


def _compare(
    model: InterpretableModel,
    ids: Tensor,
    config: SteerConfig,
    sites: Mapping[str, SiteKey],
    edits: Mapping[str, Sequence[Edit]],
    where: Positions,
) -> tuple[Tensor, tuple[ChangedFeature, ...]]:
    """Read one text with and without steering: KL of every prediction, and the features that changed most."""
    with model.interpretation_enabled(when="after"):
        plain = model(ids[:, :-1], use_cache=False).logits[0]
        before = model.get_active_features()
        with model.steering_enabled(edits, error_term=config.error_term, positions=where):
            steered = model(ids[:, :-1], use_cache=False).logits[0]
        after = model.get_active_features()
    if not torch.isfinite(steered).all():
        raise ArgumentError("the edits make the model's predictions NaN or infinite; use smaller values")
    changed = []
    for name, site in sites.items():
        means = [_means(track) for track in (before[name], after[name])]
        order = (means[1] - means[0]).abs().sort(descending=True, stable=True).indices[: config.changed]
        changed += [
            ChangedFeature(site=site, feature_id=i, unsteered=float(means[0][i]), steered=float(means[1][i]))
            for i in order.tolist()
            if means[0][i] != means[1][i]
        ]
    return divergence(plain, steered), tuple(changed)


def _means(codes: Tensor) -> Tensor:
    """Mean code of every feature (F) over the tokens of the first row, the first token left out."""
    row, position, feature = codes.indices()
    total = torch.zeros(codes.shape[2], dtype=torch.float64)
    keep = (row == 0) & (position > 0)
    total.index_add_(0, feature[keep], codes.values()[keep].double())
    return total / max(codes.shape[1] - 1, 1)
