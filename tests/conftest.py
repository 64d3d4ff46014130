"""Shared by every test: quiet, offline processes, and the folders of outside data that may be absent."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch, transformers or matplotlib: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
sys.path.append(str(REPOSITORY / "scripts"))  # the developers' programs are tested too


def _folder_or_skip(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        pytest.skip(f"{what} not there: {os.path.relpath(folder, REPOSITORY)} (seen from the repository) is no folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: of several processes, none shall be left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _logging_as_found() -> Iterator[None]:
    """A program that a test calls in this process silences the package for itself alone, not for the next test."""
    logger = logging.getLogger("dual_loop")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(params=["float32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test in float32, and in the bfloat16 autocast that real runs use; fixtures of a module come before it."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "bf16"):
        yield request.param


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_samples() -> Path:
    """A folder beside the repository with a few real files of the four data sets; skips where it is absent."""
    return _folder_or_skip(SHARED / "data" / "real_samples", "real samples of the data sets are")


@pytest.fixture(scope="session")
def shared_coco() -> Path:
    """A folder beside the repository with 80 photographs of COCO and their instances; skips where it is absent."""
    return _folder_or_skip(SHARED / "data" / "coco_mini", "real photographs of COCO are")


@pytest.fixture(scope="session")
def golden() -> Path:
    """A folder beside the repository with outputs of the original Sa2VA; skips where it is absent."""
    return _folder_or_skip(SHARED / "golden", "outputs of the original Sa2VA are")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set of all four sources, six images each; a test that changes it copies it first."""
    from dual_loop.testing.demo_data import write_demo_data

    root = tmp_path_factory.mktemp("shared_demo") / "demo"
    write_demo_data(root, 6, 9, num_val=4)
    return root
