"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# The test machine may be busy: with more threads than free cores, small networks are ten times slower.
torch.set_num_threads(1)


def _shared() -> Path:
    return Path(os.environ.get("QBENCH_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images, weights and golden answers; the test is skipped where there is none."""
    folder = _shared()
    if not (folder / "golden").is_dir():
        pytest.skip(f"no golden answers, images and weights at {folder}; set QBENCH_SHARED to the folder that has them")
    return folder


def pytest_collectstart() -> None:
    """The same random layers in a module's parameters, whichever modules were imported before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("QBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
