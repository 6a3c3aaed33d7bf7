"""A model and SAEs, loaded once and proved to fit each other: token ids in, activations at hook points out."""

from collections.abc import Sequence

from torch import Tensor

from pipeline.config import ModelConfig, SaeConfig
from pipeline.errors import ConfigError
from pipeline.io.checkpoints import LoadedSae, load_sae
from pipeline.io.device import choose_device, choose_dtype
from pipeline.io.model import LanguageModel
from pipeline.io.tokenizer import Tokenizer
from pipeline.types import HookPoint, SiteKey, wrong_with_name


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
            one.path, hook_point=one.hook_point, format_name=one.format, name=one.name, revision=one.revision, k=one.k
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

    def __init__(self, model: ModelConfig, saes: Sequence[SaeConfig]):
        """Load everything.

        Raises:
            ConfigError: if an SAE is not as wide as the activations at its hook point.
        """
        self.device = choose_device(model.device)
        self.tokenizer = Tokenizer(model.id, model.revision, trust_remote_code=model.trust_remote_code)
        self.model = LanguageModel(
            model.id,
            model.revision,
            dtype=choose_dtype(model.dtype, self.device),
            device=self.device,
            trust_remote_code=model.trust_remote_code,
        )
        self.loaded = load_saes(saes)
        self.saes = {key: loaded.sae.to(self.device) for key, loaded in self.loaded.items()}
        self.points = sorted({key.hook_point for key in self.saes})
        widths = self.model.widths(self.points)
        for key, sae in self.saes.items():
            if sae.width != widths[key.hook_point]:
                raise ConfigError(
                    f"SAE {key.sae} is {sae.width} wide, but {key.hook_point} of {model.id} is "
                    f"{widths[key.hook_point]} wide; is this the SAE of another model or hook point?"
                )

    def activations(self, input_ids: Tensor, points: Sequence[HookPoint] | None = None) -> dict[HookPoint, Tensor]:
        """One forward pass over (B, T) ids, as far as the deepest of `points` (all by default); (B, T, D) each."""
        with self.model.captures(self.points if points is None else points) as captures:
            return self.model.run(captures, input_ids)

    def drop_above(self) -> None:
        """Free the blocks above the deepest hook point, and the head."""
        self.model.drop_above(max(point.layer for point in self.points))
