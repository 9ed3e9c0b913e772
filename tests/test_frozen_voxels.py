"""Frozen encoders judged voxel by voxel."""

import json
import re

import numpy as np
import pytest
import torch
from test_segmentation import write_pairs

from medssl.benchmarks import frozen_voxels
from medssl.errors import InputError
from medssl.models.unet3d import UNet3dEncoder


def test_columns_are_every_level_at_every_voxel():
    encoder, x = UNet3dEncoder(width=16).train(), torch.rand(1, 1, 11, 16, 13)
    found = frozen_voxels.columns(encoder, x)
    assert found.shape == (11 * 16 * 13, 16 + 32 + 64 + 128)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 0, 0, 5), mode="replicate")
    with torch.no_grad():
        first, *_, last = encoder(padded)
    assert np.allclose(found[:, :16], first[0, :, :11, :, :13].flatten(1).T, atol=1e-5)
    corner = found.reshape(11, 16, 13, -1)[0, 0, 0, -128:]
    assert np.allclose(corner, last[0, :, 0, 0, 0], atol=1e-5)  # the first voxel lies in the first of the deepest map


def test_structures_that_grey_values_show_are_found(tmp_path, capsys):
    root, rows = write_pairs(tmp_path / "data", 6), tmp_path / "rows.jsonl"
    weights = str(tmp_path / "zero.pt")
    zero = {key: value * 0 for key, value in UNet3dEncoder(width=16).state_dict().items()}
    torch.save({"state_dict": zero}, weights)
    command = ["--data", str(root), "--dataset", "folder", "--arch", "unet3d_quarter", "--workers", "0", "--draws", "2"]
    frozen_voxels.main([*command, "--init", "random", weights, "--rows", str(rows), "--annotation-percent", "50"])
    good, blind = (json.loads(line) for line in rows.read_text().splitlines())
    assert min(good["dice"]) > 0.8
    assert max(blind["dice"]) < 0.5  # constant maps tell nothing
    assert re.search(r"zero\.pt: Dice 0\.\d+ ± 0\.\d+, gain -0\.\d+ ± 0", capsys.readouterr().out)


def test_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="--dataset phantom2d: has images, not volumes"):
        frozen_voxels.main(["--dataset", "phantom2d"])
