"""What every test can count on: one thread, fixed seeds, no network; and skips for what a machine lacks, and why."""

from __future__ import annotations

import gc
import os
import random
import shutil
from pathlib import Path

# Before torch is imported, and for the processes that tests start: threads of two workers would fight for the cores,
# and the outcome of a test must not depend on what a server answers today.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The first example of a property compiles or allocates, so a time limit per example would only measure the machine; and
# a failure that comes and goes helps nobody.
settings.register_profile("qvit", deadline=None, derandomize=True)
settings.load_profile("qvit")

SEED = 0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Path of a Chromium on this machine; a test that needs one takes the fixture `browser_path`."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def missing_browser() -> str | None:
    """Why tests with a browser cannot run here, or None."""
    if find_browser() is None:
        return f"no Chromium on this machine (looked for {', '.join(BROWSERS)})"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if item.get_closest_marker("browser") and (reason := missing_browser()):
        pytest.skip(reason)


def pytest_collection_finish() -> None:
    """What torch, timm and the test files have loaded stays to the end, so nobody searches it for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, whichever tests ran before it; returns the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session")
def browser_path() -> str:
    """Path of a Chromium to start headless (`executable_path` of playwright); skips where there is none."""
    if reason := missing_browser():
        pytest.skip(reason)
    return str(find_browser())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images and weights: `QVIT_DATA`, or `../shared/data` seen from the checkout; skips without one.

    Everything that can be tested without it is; a test that takes this fixture adds evidence on real photographs.
    """
    if given := os.environ.get("QVIT_DATA"):
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            pytest.fail(f"QVIT_DATA={given} is not a folder")
        return folder
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real images: set QVIT_DATA to a folder that has some")
    return folder
