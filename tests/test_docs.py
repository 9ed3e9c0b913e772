"""The documentation's snippets run, and its commands are those of the scripts (tests/test_finetune.py)."""

import importlib
import re
import shlex
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


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    """Strictly: a link that leads nowhere, and a page that no menu has, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "your_own_data", "results/pneumoniamnist_contrastive"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 3000
    page = (tmp_path / "site" / "methods" / "concl.html").read_text(encoding="utf-8")
    assert "Keys are means of the teacher" in page  # of the docstring
    assert "<!-- docstring" not in page
    assert "WARNING" not in done.stderr
    assert "not included in the" not in done.stderr


METHODS = sorted(path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py"))
PLACES = {"data", "dataset", "data_set", "output", "d", "version"}


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_page_spells_out_its_defaults(method):
    """Where a default depends on the dimension, the version or the data set, those of the recipe's own."""
    script = importlib.import_module(f"medssl.train_{method}")
    defaults = vars(script.get_parser().parse_args([]))
    choices = getattr(script, "DEFAULTS", None) or getattr(script, "VERSIONS", {})
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    recipe = re.search(r"## Recipe\n.*?```\n(.*?)```", page, flags=re.S)[1]
    for line in recipe.splitlines():
        words = shlex.split(line)[2:]
        given = vars(script.get_parser().parse_args(words))
        assert {"--b", "--epochs", "--lr", "--optimizer", "--schedule"} <= set(words)
        which = "medmnist" if method == "magical" else given.get("version") or given["d"]
        expected = {name: value for name, value in {**defaults, **choices.get(which, {})}.items() if name not in PLACES}
        assert {name: given[name] for name in expected if given[name] is not None} == {
            name: value for name, value in expected.items() if value is not None and given[name] is not None
        }
    assert f"<!-- docstring train_{method}." in page
    assert (ROOT / "docs" / "methods" / f"{method}.jpg").stat().st_size > 10_000
