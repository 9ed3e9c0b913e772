"""One thread for each process of the tests: threads that wait for each other on a busy machine take ten times as long."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
