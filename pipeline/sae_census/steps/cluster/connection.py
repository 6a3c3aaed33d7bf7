"""Reaching a cluster, or starting a private one; where nothing answers, saying so in a sentence."""

import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sae_census.config import ClusterConfig
from sae_census.errors import ConfigError

_KNOCK_SECONDS = 10


def uses_ray(settings: ClusterConfig) -> bool:
    """Whether tasks go to actors, or are done in this process."""
    return settings.executor == "ray" or (settings.executor == "auto" and settings.num_workers > 1)


@contextmanager
def connected(settings: ClusterConfig) -> Iterator[None]:
    """Ray for the time of the block, if the settings want it: a private one, or a running cluster.

    Blocks nest: only the outermost connects and disconnects.

    Raises:
        ConfigError: if no cluster answers at the address.
    """
    if not uses_ray(settings):
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    if ":" in settings.address:
        _check_reachable(settings.address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if settings.address == "local":
            cpus = settings.num_workers * settings.threads_per_worker
            memory = 256 << 20  # results are small
            ray.init("local", num_cpus=cpus, object_store_memory=memory, include_dashboard=False, **quiet)
        else:
            ray.init(settings.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(_unreachable(settings.address, error)) from error
    try:
        yield
    finally:
        ray.shutdown()
        _leave_early()


def _leave_early() -> None:
    """Let the process end before its C++ objects are destroyed, once Python is done with everything of its own.

    Ray leaves threads behind that touch such objects every few seconds: a process that has connected twice now and
    then ends in a segmentation fault after its work is done. The C library calls what was registered last first, and
    gives it the exit code.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc has it
        libc.on_exit(libc._exit, None)


def _check_reachable(address: str) -> None:
    """Where nothing listens, Ray tries for minutes and then ends the process instead of raising."""
    host, port = address.removeprefix("ray://").rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(_unreachable(address, error)) from error


def _unreachable(address: str, error: Exception) -> str:
    why = " ".join(str(error).split())[:200]
    if isinstance(error, ImportError):
        return f"cluster.address {address}: the Ray client is not installed ({why}); pip install 'ray[client]'"
    if "Initialization failure from server" in why:
        last = str(error).strip().splitlines()[-1].strip()
        return (
            f"cluster.address {address}: its client server could not open a session ({last}); try again, or start the "
            "job inside the cluster with cluster.address=auto"
        )
    if "version mismatch" in why.lower():
        return f"cluster.address {address}: the cluster runs other versions than this process ({why}); use the same"
    return f"cluster.address {address}: no Ray cluster answers there ({why}); start one or use local"
