"""What libraries say about correctness, passed on: one line `warning: …` on stderr, once for each message.

While they load and run, libraries draw bars, give advice, and now and then say that a result will be wrong. Bars and
the advice that `NOISE` names are dropped; every other warning reaches the user.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING, Handler, LogRecord, StreamHandler, getLogger
from typing import TextIO

_LOGGERS = ("transformers", "huggingface_hub", "datasets")
NOISE = tuple(
    map(
        re.compile,
        (
            r"LOAD REPORT",  # sae_census.io.loading.soundness reads that report itself, and says what follows
            r"unauthenticated requests to the HF Hub",  # rate limits
            r"[Xx]et [Ss]torage|hf_xet",  # speed of downloads
            r"cache-system uses symlinks",  # disk space
            r"fast path is not available",  # speed: the plain implementation computes the same
            r"Setting `pad_token_id` to `eos_token_id`",  # filling is masked
            r"generation flags are not valid and may be ignored",  # ours say all that they mean
            r"longer than the specified maximum sequence length",  # we cut contexts ourselves
        ),
    )
)
"""Messages that are dropped: none says that a result is wrong."""
_ABOUT_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning, ImportWarning)
"""Python's warnings for whoever writes code: what is computed today is as it should be."""

_passed: dict[str, None] = {}
_streams: list[TextIO] = []
_captured: list[list[str]] = []


def pass_on(text: str) -> None:
    """Pass a warning on, unless it is noise or was passed on before."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    if text in _passed or any(noise.search(text) for noise in NOISE):
        return
    _passed[text] = None
    (_streams[0] if _streams else sys.stderr).write(f"warning: {text}\n")


def passed_on() -> list[str]:
    """Every warning that this process passed on, in the order it came."""
    return list(_passed)


class _LogHandler(Handler):
    def emit(self, record: LogRecord) -> None:
        for lines in _captured:
            lines.append(record.getMessage())
        pass_on(record.getMessage())


_handler = _LogHandler(WARNING)


def take_over() -> None:
    """Take over what the libraries log, from now on; only ours are printed."""
    for name in _LOGGERS:
        logger = getLogger(name)
        for handler in logger.handlers[:]:
            if type(handler) is StreamHandler:
                logger.removeHandler(handler)
        logger.addHandler(_handler)  # a handler that is there is not added again
        logger.propagate = False
        if logger.getEffectiveLevel() > WARNING:
            logger.setLevel(WARNING)


@contextmanager
def captured() -> Iterator[list[str]]:
    """While something loads: what is logged or warned of is passed on, also where stderr is taken away meanwhile.

    Yields what is logged, noise and all, for whoever explains an error.
    """
    take_over()
    _streams.append(sys.stderr)
    _captured.append([])
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield _captured[-1]
    finally:
        for warning in caught:
            if not issubclass(warning.category, _ABOUT_CODE):
                pass_on(str(warning.message))
        _streams.pop()
        _captured.pop()
