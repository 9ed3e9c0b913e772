"""One thread for each process of the tests: on a busy machine, threads wait for each other ten times as long."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
