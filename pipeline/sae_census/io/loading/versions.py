"""What software computes here: versions decide last bits and no identity, so they are told beside what they made."""

import ctypes
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("sae-census", "transformers", "tokenizers", "numpy")
_DRIVER = Path("/proc/driver/nvidia/version")


def versions(device: torch.device | None = None) -> dict[str, str]:
    """By name; on a GPU also CUDA, cuBLAS, cuDNN and the driver."""
    found = {name: version(name) for name in _PACKAGES}
    found |= {"python": platform.python_version(), "torch": str(torch.__version__)}
    return found | (_of_cuda() if device is not None and device.type == "cuda" else {})


def others(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What differs of the software that both name, in words; empty if nothing does."""
    names = sorted(name for name in one.keys() & other.keys() if one[name] != other[name])
    return ", ".join(f"{name} {one[name]} and {other[name]}" for name in names)


def _of_cuda() -> dict[str, str]:
    return {
        "cuda": str(torch.version.cuda),
        "cublas": _cublas(),
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": _driver(),
    }


def _cublas() -> str:
    """As the library says that torch has loaded: a second handle of it is the same one."""
    try:
        library = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).split('.')[0]}")
        parts = [ctypes.c_int() for _ in range(3)]
        for kind, part in enumerate(parts):  # major, minor, patch
            library.cublasGetProperty(kind, ctypes.byref(part))
    except (OSError, AttributeError):
        return "unknown"
    return ".".join(str(part.value) for part in parts)


def _driver() -> str:
    """Of the kernel module, as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  …` names it."""
    try:
        words = _DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
