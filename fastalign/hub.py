"""The Hugging Face hub, asked once: where it does not answer, only its local cache is read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from datasets import config as datasets_config
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import httpx

log = logging.getLogger(__name__)

CONNECT = 5.0
"""Seconds to reach the hub's machine; what follows has the libraries' own limits, and downloads have none."""
DOWN = (502, 503, 504)
"""What a gateway answers for a hub that is down."""


def looks_local(name: str) -> bool:
    """Whether a name that is not there must be a path, because no repository is called so."""
    steps = name.split("/")
    shaped = len(steps) < 3 and "" not in steps and ".." not in steps
    return Path(name).is_absolute() or name.startswith((".", "~")) or not shaped or "\\" in name


@contextmanager
def asked_once(what: str) -> Iterator[None]:
    """Lets the libraries ask the hub inside, or only its local cache where the hub does not answer one attempt.

    They would try each file six times over half a minute. ``what`` names what is loaded in the line that is logged
    when it comes from the cache.
    """
    if (reason := silent()) is None or is_offline():
        yield
        return
    with _offline():
        yield
    log.warning(
        "%s: from the local cache, the hub does not answer (%s); HF_HUB_OFFLINE=1 does not ask it", what, reason
    )


def silent() -> str | None:
    """Why the hub cannot be asked, or None when it can."""
    return "HF_HUB_OFFLINE=1" if is_offline() else _attempt(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether the user keeps the libraries from asking the hub."""
    return huggingface_hub.is_offline_mode()


@lru_cache
def _attempt(endpoint: str) -> str | None:
    """One attempt to reach the hub; any answer counts. Remembered, as a run loads several things."""
    timeout = httpx.Timeout(constants.HF_HUB_ETAG_TIMEOUT, connect=CONNECT)
    try:
        status = huggingface_hub.get_session().head(endpoint, timeout=timeout).status_code
    except httpx.TimeoutException as error:
        at_once = isinstance(error, httpx.ConnectTimeout)
        limit = f"{CONNECT:g} s" if at_once else f"{constants.HF_HUB_ETAG_TIMEOUT:g} s (HF_HUB_ETAG_TIMEOUT)"
        return f"{endpoint}: nothing within {limit}"
    except (httpx.HTTPError, OSError) as error:
        return f"{endpoint}: {str(error).strip() or type(error).__name__}"
    return f"{endpoint}: status {status}" if status in DOWN else None


@contextmanager
def _offline() -> Iterator[None]:
    """The libraries' own offline mode."""
    places = (constants, datasets_config)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True  # type: ignore[misc]
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[misc]


@contextmanager
def quiet() -> Iterator[None]:
    """What the libraries log on the way to an error is left out: the error says it better."""
    loggers = {logging.getLogger(name): level for name, level in _LEVELS.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(max(level, logger.level))
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


_LEVELS = {"datasets": logging.CRITICAL, "huggingface_hub": logging.ERROR}


def why_not(name: str, kind: str, error: BaseException, remedy: str = "give a local directory") -> str:
    """Why a model, tokenizer or dataset of the hub could not be loaded, and what to do."""
    place = f"no file or directory {name!r} here" if kind == "dataset" else f"no directory {name!r} here"
    missing = f"the hub's local cache has no such {kind}"
    if is_offline():
        return f"{place}, {missing}, and HF_HUB_OFFLINE=1 forbids asking the hub: unset it, or {remedy}"
    if (reason := silent()) is not None:
        silence = f"the hub does not answer ({reason}; HF_HUB_OFFLINE=1 does not ask it)"
        return f"{place}, {silence} and {missing}: check the name and the network, or {remedy}"
    causes = [*_causes(error)]
    said = first_line(causes[-1])
    kinds = {type(cause) for cause in causes}
    lost = DatasetNotFoundError in kinds  # its own causes are cut off
    if GatedRepoError in kinds or (lost and "gated" in said):
        return f"{name!r} is gated on the hub: accept its terms on its page there, then run `hf auth login`"
    if RepositoryNotFoundError in kinds or (lost and said.startswith("Dataset")):
        return (
            f"{place}, and no such {kind} on the hub: check the name, or {remedy}; a private one needs `hf auth login`"
        )
    return f"{kind} {name!r} of the hub: {said}"


def first_line(error: BaseException) -> str:
    """The first line of an error, or its type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the innermost last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
