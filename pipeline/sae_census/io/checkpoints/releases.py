"""Releases of SAELens whose settings stand in that library's list alone, not in the folder that one downloads.

The library overrides a folder's config by its list of releases (`config_overrides` and `norm_scaling_factor` in
pretrained_saes.yaml of sae-lens 6.54) when an SAE is loaded by release and id. Loaded by path, the same folder gives
other codes. Here are those overrides that change numbers, for the formats that are read here; overrides that only
name a dataset change none. Llama-Scope-R1-Distill has 96 such factors, which the user gives.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What the list says of a repository."""

    name: str
    """In the list."""
    repository: str
    """Of the hub, without its owner."""
    folder: str
    """Names of its folders, as a pattern; empty where others are called alike."""
    models: tuple[str, ...]
    """What its configs may call the model."""
    hook_points: str
    """As a pattern."""
    num_features: int | None = None
    """Where all its SAEs are alike."""
    normalize_activations: str | None = None
    norm_scaling_factors: Mapping[str, float] = field(default_factory=dict)
    """By hook point."""
    center_writing_weights: bool = False


RELEASES = (
    Release(
        name="mistral-7b-res-wg",
        repository="Mistral-7B-Residual-Stream-SAEs",
        folder=r"mistral_7b_layer_(8|16|24)",
        models=("mistral-7b", "mistral-7b-v0.1"),
        hook_points=r"blocks\.(8|16|24)\.hook_resid_pre",
        normalize_activations="constant_norm_rescale",
    ),
    Release(
        name="gpt2-small-mlp-tm",
        repository="gpt2-small-mlp-out-saes",
        folder=r"sae_group_gpt2_blocks\.\d+\.hook_mlp_out_24576:v\d",
        models=("gpt2", "gpt2-small"),
        hook_points=r"blocks\.\d+\.hook_mlp_out",
        num_features=24576,
        norm_scaling_factors={
            "blocks.0.hook_mlp_out": 1.049317316132615,
            "blocks.1.hook_mlp_out": 2.3693984005104283,
            "blocks.2.hook_mlp_out": 1.6411934982190302,
            "blocks.3.hook_mlp_out": 1.8958522157897557,
            "blocks.4.hook_mlp_out": 1.81673478700627,
            "blocks.5.hook_mlp_out": 1.550234472245924,
            "blocks.6.hook_mlp_out": 1.3237742807210804,
            "blocks.7.hook_mlp_out": 1.1042905114723296,
            "blocks.8.hook_mlp_out": 0.9123762783479742,
            "blocks.9.hook_mlp_out": 0.6955335635232373,
            "blocks.10.hook_mlp_out": 0.3619728926727644,
            "blocks.11.hook_mlp_out": 0.2851548652550073,
        },
        center_writing_weights=True,
    ),
    Release(
        name="gpt2-small-res-jb",
        repository="GPT2-Small-SAEs-Reformatted",
        folder="",
        models=("gpt2", "gpt2-small"),
        hook_points=r"blocks\.\d+\.hook_resid_(pre|post)",
        num_features=24576,
        center_writing_weights=True,
    ),
    Release(
        name="gpt2-small-res-jb-feature-splitting",
        repository="GPT2-Small-Feature-Splitting-Experiment-Layer-8",
        folder=r"blocks\.8\.hook_resid_pre_\d+",
        models=("gpt2", "gpt2-small"),
        hook_points=r"blocks\.8\.hook_resid_pre",
        center_writing_weights=True,
    ),
    Release(
        name="gemma-2b-res-jb",
        repository="Gemma-2b-Residual-Stream-SAEs",
        folder=r"gemma_2b_blocks\.12\.hook_resid_post_16384",
        models=("gemma-2b",),
        hook_points=r"blocks\.12\.hook_resid_post",
        num_features=16384,
        norm_scaling_factors={"blocks.12.hook_resid_post": 0.21381938399317255},
    ),
)


def by_path(folder: Path, hook_name: str) -> Release | None:
    """The release whose repository a folder lies in, by the parts of its path; a cache's `models--owner--name` too."""
    names = {part.rsplit("--", 1)[-1] for part in folder.absolute().parts}
    found = (one for one in RELEASES if one.repository in names and re.fullmatch(one.hook_points, hook_name))
    return next(found, None)


def alike(folder: Path, metadata: Mapping[str, Any], num_features: int) -> Release | None:
    """The release that a folder outside its repository looks like, by its name or by what its config says."""
    hook_name, model = str(metadata.get("hook_name")), str(metadata.get("model_name")).rsplit("/", 1)[-1].lower()
    for one in RELEASES:
        if not re.fullmatch(one.hook_points, hook_name) or one.num_features not in (None, num_features):
            continue
        named = bool(one.folder and re.fullmatch(one.folder, folder.absolute().name))
        # a release that is told by width or normalisation alone would be every SAE of that model's one layer
        typical = model in one.models and (one.num_features is not None or one.normalize_activations is not None)
        if named or typical:
            return one
    return None
