"""Segmentation is compared as classification is: the same trials, paired, by Dice."""

import json

import pytest

from medssl import compare
from medssl.datasets import phantom_ct


@pytest.fixture
def few_scans(monkeypatch):
    monkeypatch.setattr(phantom_ct, "SPLITS", {"train": 4, "val": 2, "test": 2})
    phantom_ct._generated.cache_clear()
    yield
    phantom_ct._generated.cache_clear()


def test_segmentation_is_compared_by_dice(few_scans, tmp_path):
    quick = ["--d", "3", "--arch", "unet3d_quarter", "--steps", "2", "--epoch-steps", "2", "--workers", "0", "--b", "2"]
    task = ["--task", "segmentation", "--annotation-percent", "50", "100", "--trials", "1", "--overlays", "0"]
    rows = compare.main([*quick, *task, "--no-tensorboard", "--output", str(tmp_path)])
    assert [(row["percent"], row["images"], row["metric"]) for row in rows] == [(50, 2, "dice"), (100, 4, "dice")]
    for row in rows:
        results = json.loads((tmp_path / f"{row['percent']:g}_percent" / "random" / "results.json").read_text())
        assert row["values"] == [trial["dice"] for trial in results["trials"]]
    assert "| test Dice (mean ± std) |" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "comparison.png").stat().st_size > 5000
