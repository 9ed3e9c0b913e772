"""medssl: self-supervised pre-training for medical images, from raw files to an evaluated model."""

import os

__version__ = "0.1.0"

# Large pages for large tensors on CPUs (Linux): a fresh tensor costs a sixth. Read at torch's first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
