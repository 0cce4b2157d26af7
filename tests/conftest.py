"""Profiles for hypothesis, threads of workers, and what GPU tests share: skipping without a GPU, and its memory."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", max_examples=200, deadline=None, suppress_health_check=_QUIET, derandomize=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Each worker of pytest-xdist would start a thread for every core: with many of them they mostly wait for each other.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _gives_memory_back(request):
    """Workers share the GPU's memory, so none may keep a large cache of it."""
    yield
    if "gpu" in request.keywords and torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def much_memory(tmp_path_factory):
    """much_memory(bytes) skips where the GPU has not so many free. Tests that use it run one at a time among all workers."""
    import fcntl

    def ask(size):
        free, total = torch.cuda.mem_get_info()
        if free < size + 2**30:
            pytest.skip(
                f"{size / 2**30:.0f} GiB of GPU memory wanted, {free / 2**30:.0f} of {total / 2**30:.0f} are free"
            )

    base = tmp_path_factory.getbasetemp()
    with open((base.parent if _WORKERS > 1 else base) / "gpu-memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield ask
        torch.cuda.empty_cache()
