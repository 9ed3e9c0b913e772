"""One thread for each process of the tests: on a busy machine, threads wait for each other ten times as long."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# Generated images are made once for all tests, and not in the user's own cache.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache")

import torch  # noqa: E402

torch.set_num_threads(1)
