"""One thread for each process of the tests: on a busy machine, threads wait for each other ten times as long."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# Generated images are made once for all tests, and not in the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache")

import pytest  # noqa: E402
import torch  # noqa: E402

from medssl.datasets.phantoms import radiograph  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def few_radiographs():
    """Generated radiographs of which as many train as ever, and few validate and test: judging them takes longer than
    a test's steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radiograph, "SPLITS", radiograph.SPLITS | {"val": 48, "test": 64})
        yield
