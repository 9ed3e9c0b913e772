"""The documentation's snippets run, and its commands are those of the scripts (tests/test_finetune.py)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl.models.encoders import IMAGENET, make_encoder
from medssl.models.pcrlv2_model_3d import PCRLv23d

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets() -> list:
    return [
        pytest.param(code, id=f"{page.name}_{i}")
        for page in PAGES
        for i, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        )
    ]


def test_there_are_snippets():
    assert len(snippets()) >= 8


@pytest.mark.parametrize("code", snippets())
def test_snippets_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    torch.manual_seed(0)
    network = PCRLv23d() if "3d" in code else make_encoder("resnet18")
    content = {"state_dict": network.state_dict(), "arch": "resnet18", "dims": 2, "normalization": IMAGENET}
    torch.save(content, tmp_path / "OUT" / "encoder.pt")
    found: dict = {}
    exec(compile(code, "snippet", "exec"), found)
    if "model" in found and "OUT/encoder.pt" in code:  # the weights are in it
        first = next(value for key, value in network.state_dict().items() if value.ndim > 3)
        same = [p for p in found["model"].parameters() if p.shape == first.shape]
        assert any(torch.equal(p, first) for p in same)


def test_the_site_is_built(tmp_path):
    """Strictly: a link that leads nowhere, and a page that no menu has, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "your_own_data", "results/pneumoniamnist_contrastive"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 3000
    assert "WARNING" not in done.stderr
    assert "not included in the" not in done.stderr
