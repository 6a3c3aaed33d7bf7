"""Small random checkpoints of every format, written as their own libraries lay them out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_census.io.checkpoints.files import read_tensors

Config = dict[str, Any]
Tensors = dict[str, Tensor]

SIZES = [(7, 24), (16, 16)]
"""(D, F); where both are equal no shape tells which way a matrix lies."""
Config = dict[str, Any]
Tensors = dict[str, Tensor]
Arrays = dict[str, np.ndarray]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(d: int, f: int, *, encoder: str, decoder: str, enc: str, dec: str, flipped: bool) -> Tensors:
    """An SAE's four tensors by these names, decoder rows of many lengths; `flipped` as nn.Linear keeps them."""
    w_enc, w_dec = normal(d, f, seed=1), normal(f, d, seed=2) * torch.linspace(0.3, 2, f)[:, None]
    sides = {encoder: w_enc, decoder: w_dec}
    matrices = {name: (side.T.contiguous() if flipped else side) for name, side in sides.items()}
    return matrices | {enc: 0.5 * normal(f, seed=3), dec: 0.5 * normal(d, seed=4)}


def folder_of(root: Path, name: str, *, config: tuple[str, Config] | None = None) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    if config:
        (folder / config[0]).write_text(json.dumps(config[1]))
    return folder


K = 6


NAMES = {"encoder": "W_enc", "decoder": "W_dec", "enc": "b_enc", "dec": "b_dec"}

LOWER = NAMES | {"encoder": "w_enc", "decoder": "w_dec"}


def qwen_scope(
    root: Path, d: int = 7, f: int = 24, name: str = f"SAE-Res-Qwen-W1K-L0_{K}", layers: Any = (12,)
) -> Path:
    folder = folder_of(root, name)
    for layer in layers:
        tensors = linear(d, f, **NAMES, flipped=True)
        torch.save(tensors | {"b_dec": tensors["b_dec"] + layer}, folder / f"layer{layer}.sae.pt")
    return folder


SPARSIFY = {"encoder": "encoder.weight", "decoder": "W_dec", "enc": "encoder.bias", "dec": "b_dec"}


def sparsify(root: Path, module: str = "layers.10", d: int = 7, f: int = 24, **config: Any) -> Path:
    folder = folder_of(
        root, module, config=("cfg.json", {"d_in": d, "k": 4, "num_latents": 0, "expansion_factor": 8} | config)
    )
    tensors = linear(d, f, **SPARSIFY, flipped=False)
    tensors["encoder.weight"] = tensors["encoder.weight"].T.contiguous()
    save_file(tensors, folder / "sae.safetensors")
    return folder


LINEAR = {"encoder": "encoder.weight", "decoder": "decoder.weight", "enc": "encoder.bias"}


def dictionary_tensors(kind: str, d: int, f: int) -> Tensors:
    match kind:
        case "AutoEncoder":
            return linear(d, f, **LINEAR, dec="bias", flipped=True)
        case "AutoEncoderNew":
            return linear(d, f, **LINEAR, dec="decoder.bias", flipped=True)
        case "AutoEncoderTopK" | "BatchTopKSAE":
            tensors = linear(d, f, **LINEAR, dec="b_dec", flipped=True)
            return tensors | {"k": torch.tensor(5), "threshold": torch.tensor(1.2)}
        case "GatedAutoEncoder":
            tensors = linear(d, f, **LINEAR, dec="decoder_bias", flipped=True)
            del tensors["encoder.bias"]
            return tensors | {
                "gate_bias": normal(f, seed=5),
                "mag_bias": normal(f, seed=6),
                "r_mag": normal(f, seed=7) / 2,
            }
        case "JumpReluAutoEncoder":
            threshold = normal(f, seed=8)  # also below 0: its ReLU stands behind
            return linear(d, f, **NAMES, flipped=False) | {"threshold": threshold}
    tensors = linear(d, f, **NAMES, flipped=False)
    return tensors | {"k": torch.tensor(5), "threshold": torch.tensor(1.2), "group_sizes": torch.tensor([4, f - 4])}


def dictionary(root: Path, tensors: Tensors, trainer: Config, buffer: Config | None = None) -> Path:
    folder = folder_of(root, "trainer_0", config=("config.json", {"trainer": trainer, "buffer": buffer or {}}))
    torch.save(tensors, folder / "ae.pt")
    return folder


def gemma_scope(root: Path, inner: str, d: int = 7, f: int = 24, *, lower: bool = False) -> Path:
    folder = folder_of(root, inner)
    arrays = linear(d, f, **NAMES, flipped=False) | {"threshold": normal(f, seed=5).abs() + 0.5}
    rename = {"W_enc": "w_enc", "W_dec": "w_dec"} if lower else {}
    np.savez(folder / "params.npz", **{rename.get(name, name): value.numpy() for name, value in arrays.items()})
    return folder


def gemma_scope_2(root: Path, inner: str = "resid_post/layer_9_width_16k_l0_medium", **config: Any) -> Path:
    folder = folder_of(root, inner, config=("config.json", config) if config else None)
    arrays = linear(7, 24, **LOWER, flipped=False) | {"threshold": normal(24, seed=5).abs() + 0.5}
    save_file(arrays, folder / "params.safetensors")
    return folder


NORM = 3.1


def llama_scope(root: Path, d: int, f: int, tensors: Tensors, **hyperparams: Any) -> Path:
    config = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "d_model": d,
        "d_sae": f,
        "act_fn": "topk",
        "jump_relu_threshold": 1.5,
        "top_k": 5,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
    }
    folder = folder_of(root, "L15R-8x", config=("hyperparams.json", config | hyperparams))
    (folder / "checkpoints").mkdir()
    save_file(tensors, folder / "checkpoints/final.safetensors")
    return folder


POINT = "blocks.7.hook_resid_post"


NEW = {"encoder": "W_E", "decoder": "W_D", "enc": "b_E", "dec": "b_D"}


def llamascopium(root: Path, tensors: Tensors, **changes: Any) -> Path:
    config = {
        "sae_type": "sae",
        "hook_point_in": POINT,
        "hook_point_out": POINT,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
    }
    folder = folder_of(root, "L7R", config=("config.json", config | changes))
    norm = {f"dataset_average_activation_norm.{POINT}": torch.tensor(NORM)}
    save_file(norm | tensors, folder / "sae_weights.safetensors")
    return folder


def corrupt(write: Callable[[Path], Path], **tensors: Tensor | None) -> Callable[[Path], Path]:
    """The checkpoint with these tensors of its torch or safetensors file replaced, or left out if None."""

    def made(root: Path) -> Path:
        folder = write(root)
        file = next(path for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors"))

        changed = {
            n: t for n, t in (read_tensors(file) | {k.replace("__", "."): v for k, v in tensors.items()}).items()
        }
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        torch.save(kept, file) if file.suffix == ".pt" else save_file(kept, file)
        return folder

    return made


def dictionary_of(kind: str, trainer: Config | None = None) -> Callable[[Path], Path]:
    about = {"dict_class": kind, "submodule_name": "resid_post_layer_8"} | (trainer or {})
    return lambda root: dictionary(root, dictionary_tensors(kind, 7, 24), about)


def llama_of(**hyperparams: Any) -> Callable[[Path], Path]:
    return lambda root: llama_scope(
        root, 7, 24, linear(7, 24, **LINEAR, dec="decoder.bias", flipped=True), **hyperparams
    )


def llamascopium_of(**changes: Any) -> Callable[[Path], Path]:
    threshold = {"activation_function.log_jumprelu_threshold": torch.zeros(24)}
    return lambda root: llamascopium(root, linear(7, 24, **NEW, flipped=False) | threshold, **changes)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sparsify": sparsify,
    "dictionary_learning": dictionary_of("AutoEncoder"),
    "gemma_scope": lambda root: gemma_scope(root, "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_7"),
    "gemma_scope_2": gemma_scope_2,
    "llama_scope": llama_of(),
    "llamascopium": llamascopium_of(),
    "qwen_scope": qwen_scope,
}
