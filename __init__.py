"""medssl: self-supervised pre-training for medical images, from raw files to an evaluated model."""

__version__ = "0.1.0"
