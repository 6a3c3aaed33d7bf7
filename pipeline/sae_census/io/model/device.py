"""The machine: which device and dtype are meant, settings that decide speed and last bits, and what to call them."""

import ctypes
import platform
from pathlib import Path

import torch

from sae_census.errors import ConfigError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device {name!r} is none; expected auto, cpu or cuda") from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def configure(threads: int, device: torch.device) -> dict[str, str | int]:
    """Set this process up for analysis and say how: equal answers under equal versions promise equal bits.

    glibc maps and unmaps every large buffer afresh, which costs fp32 forward passes a third of their time in
    page faults; here it keeps them. torch's default fp32 matmul runs at half speed on AMD processors, where
    'medium' is faster; it is used only if a product of random matrices shows that it still computes in fp32.
    """
    torch.set_num_threads(threads)
    kept = platform.libc_ver()[0] == "glibc" and _keep_memory()
    precision = "highest"
    if device.type == "cpu" and "AuthenticAMD" in _cpu_text():
        torch.set_float32_matmul_precision("medium")
        precision = "medium" if _matmul_error() < 1e-5 else "highest"
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return {
        "device_class": describe(device),
        "threads": threads if device.type == "cpu" else 0,
        "float32_matmul": precision,
        "malloc": "keeps large buffers" if kept else "default",
    }


def describe(device: torch.device) -> str:
    """The class of hardware on which results are bit-identical.

    Raises:
        ConfigError: if the device is not there.
    """
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("model.device asks for cuda, but no CUDA device is available; use model.device=cpu")
        return f"cuda {torch.cuda.get_device_name(device)}"
    vendor = next((line.split(":")[1].strip() for line in _cpu_text().splitlines() if "vendor_id" in line), "")
    return f"{device.type} {platform.machine()} {vendor} {torch.backends.cpu.get_cpu_capability()}"


def _cpu_text() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _matmul_error() -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    return float(((a @ b.T) - exact).norm() / exact.norm())


def _keep_memory() -> bool:
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
