"""A model and SAEs, loaded once and proved to fit each other: token ids in, activations at hook points out."""

from collections.abc import Sequence
from logging import getLogger

from torch import Tensor

from sae_census.config import ModelConfig, SaeConfig
from sae_census.errors import ConfigError
from sae_census.io.checkpoints import LoadedSae, load_sae
from sae_census.io.model.device import choose_device
from sae_census.steps.model.demands import centring_of
from sae_census.steps.model.parts import model_of, tokenizer_of
from sae_census.steps.model.provenance import Provenance
from sae_census.types import HookPoint, SiteKey, wrong_with_name

_log = getLogger(__name__)


def load_saes(chosen: Sequence[SaeConfig]) -> dict[SiteKey, LoadedSae]:
    """The SAEs of a config by site, sorted by site.

    Raises:
        ConfigError: if two have the same name at the same hook point, or one has a name that no key can hold.
    """
    found: dict[SiteKey, LoadedSae] = {}
    for one in chosen:
        if one.name is not None:
            _check_readable(one.name)
    for one in chosen:
        loaded = load_sae(
            one.path,
            hook_point=one.hook_point,
            format_name=one.format,
            name=one.name,
            revision=one.revision,
            k=one.k,
            normalize_activations=one.normalize_activations,
            norm_scaling_factor=one.norm_scaling_factor,
        )
        _check_readable(loaded.name)
        key = SiteKey(loaded.hook_point, loaded.name)
        if key in found:
            raise ConfigError(f"two SAEs are called {key.sae} at {key.hook_point}; give one another saes[].name")
        found[key] = loaded
    return dict(sorted(found.items(), key=lambda item: (str(item[0].hook_point), item[0].sae)))


def _check_readable(name: str) -> None:
    if not name or "/" in name or not name.isprintable() or name in (".", ".."):
        raise ConfigError(f"saes[].name is {name!r:.80}, which no key can hold: {wrong_with_name(name)}")


class Reader:
    """Holds tokenizer, model and SAEs on one device."""

    def __init__(self, model: ModelConfig, saes: Sequence[SaeConfig], planned: Provenance | None = None):
        """Load everything.

        Args:
            model: to load.
            saes: to load.
            planned: what all of it has to be; None: whatever lies there.

        Raises:
            ConfigError: if an SAE is not as wide as the activations at its hook point.
            IdentityError: if something is not what was planned.
        """
        self.device = choose_device(model.device)
        self.tokenizer = tokenizer_of(model)
        self.model = model_of(model, self.device)
        self.loaded = load_saes(saes)
        if planned is not None:
            planned.prove(model.id, self.model.facts.digest, self.tokenizer, self.loaded)
        self.saes = {key: loaded.sae.to(self.device) for key, loaded in self.loaded.items()}
        self.points = sorted({key.hook_point for key in self.saes})
        widths = self.model.widths(self.points)
        for key, sae in self.saes.items():
            if sae.width != widths[key.hook_point]:
                raise ConfigError(
                    f"SAE {key.sae} is {sae.width} wide, but {key.hook_point} of {model.id} is "
                    f"{widths[key.hook_point]} wide; is this the SAE of another model or hook point?"
                )

    @property
    def fill_id(self) -> int:
        """Stands behind the tokens of a short row, where it is masked: the pad token, if the model knows it."""
        return self.tokenizer.pad_id if self.tokenizer.pad_id < self.model.num_embeddings else 0

    def warn_of_centring(self) -> None:
        """Log which SAEs were trained on a model that this one is not, as to its writing weights."""
        for site, loaded in self.loaded.items():
            if found := centring_of(loaded, self.model.inner):
                _log.warning("%s: %s", site, found.text)

    def activations(self, input_ids: Tensor, points: Sequence[HookPoint] | None = None) -> dict[HookPoint, Tensor]:
        """One forward pass over (B, T) ids, as far as the deepest of `points` (all by default); (B, T, D) each."""
        with self.model.captures(self.points if points is None else points) as captures:
            return self.model.run(captures, input_ids)

    def drop_above(self) -> None:
        """Free the blocks above the deepest hook point, and the head."""
        self.model.drop_above(max(point.layer for point in self.points))
