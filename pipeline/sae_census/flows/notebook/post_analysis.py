"""What an analysis says of a feature besides its codes, by the type of its SAE: a registry, and its first entries.

A processor takes the SAE, as the caller gave it, and the config, and returns arrays whose first axis is the
feature; every feature's result receives its row under the array's name. It runs before the stream is read, so
that an SAE that does not fit is refused before the hours are spent.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sae_census.compute.notebook.cross_layer import head_geometry, target_norms
from sae_census.config import FeatureAnalyzerConfig
from sae_census.errors import ConfigError

PostAnalysis = Callable[[Any, FeatureAnalyzerConfig], Mapping[str, np.ndarray]]


def nothing(sae: Any, config: FeatureAnalyzerConfig) -> Mapping[str, np.ndarray]:
    """For plain SAEs, and for types that nobody registered."""
    return {}


def crosscoder(sae: Any, config: FeatureAnalyzerConfig) -> Mapping[str, np.ndarray]:
    """How the decoders of a feature at the H heads lie to each other.

    `decoder_norms` (H), `decoder_inner_product_matrices` (H, H), and `decoder_similarity_matrices` (H, H), the
    inner products over the lengths. The decoder is read as `w_dec` or `W_D`, (H, F, D).
    """
    geometry = head_geometry(_decoder(sae))
    return {
        "decoder_norms": geometry.norm.cpu().numpy(),
        "decoder_similarity_matrices": geometry.cosine.cpu().numpy(),
        "decoder_inner_product_matrices": geometry.inner.cpu().numpy(),
    }


def cross_layer_transcoder(sae: Any, config: FeatureAnalyzerConfig) -> Mapping[str, np.ndarray]:
    """`decoder_norms`: lengths of a feature's decoders to its own layer and to every later one.

    The decoders are read as `w_dec` or `W_D`: element i is (i + 1, F, D), from layers 0 to i to layer i.
    """
    assert config.clt_layer is not None  # the encoder insists on it
    return {"decoder_norms": target_norms(list(_decoder(sae)), config.clt_layer).cpu().numpy()}


_REGISTRY: dict[str, PostAnalysis] = {
    "sae": nothing,
    "generic": nothing,
    "crosscoder": crosscoder,
    "clt": cross_layer_transcoder,
}


def register_post_analysis(sae_type: str, processor: PostAnalysis) -> None:
    """Use this processor for SAEs of this type from now on."""
    _REGISTRY[sae_type] = processor


def post_analysis_of(sae_type: str) -> PostAnalysis:
    """The processor of a type, the generic one if none is registered.

    Raises:
        NotImplementedError: for low-rank sparse attention, unless somebody registered a processor for it.
    """
    if sae_type == "lorsa" and sae_type not in _REGISTRY:
        raise NotImplementedError(
            "an SAE of type lorsa needs z patterns, from a second pass through its own attention heads, which this "
            "project does not compute; register a processor for lorsa to go on with codes alone"
        )
    return _REGISTRY.get(sae_type, nothing)


def _decoder(sae: Any) -> Any:
    for name in ("w_dec", "W_D"):
        if hasattr(sae, name):
            return getattr(sae, name)
    raise ConfigError(
        f"an SAE of type {type(sae).__name__} has neither w_dec nor W_D, of which decoder norms are taken"
    )
