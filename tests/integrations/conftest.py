"""Quiet peers, and caches that the tests do not share with the user."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import datasets
import pytest
from transformers.utils import logging

collect_ignore = ["trl_runs.py"]  # it imports TRL, which may be absent


@pytest.fixture(scope="session", autouse=True)
def private_caches(tmp_path_factory: pytest.TempPathFactory, new_cache: Callable[[Path], str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTALIGN_CACHE", new_cache(tmp_path_factory.mktemp("data") / "cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """Progress bars would fill the log."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, float]]]:
    """``plain_run("dpo")``: the steps of a case by TRL alone, trained once."""
    import trl_runs

    return cache(lambda name: trl_runs.losses_of(name, tmp_path_factory.mktemp(name)))
