"""The published implementations' numbers, and how ours are compared with them."""

import importlib.util
import json
from pathlib import Path

PARITY = Path(__file__).parent / "parity"

_spec = importlib.util.spec_from_file_location("parity_deterministic", PARITY / "deterministic.py")
deterministic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(deterministic)


def published(name):
    return json.loads((PARITY / f"{name}.json").read_text())


def assert_close(tensor, stored, what, relative=1e-4):
    """Compare with a digest, as parity/README.md says: 1e-4 of the standard deviation plus 1e-6."""
    ours = deterministic.digest(tensor)
    assert ours["shape"] == stored["shape"], what
    bound = relative * stored["std"] + 1e-6
    difference = max(abs(a - b) for a, b in zip(ours["entries"], stored["entries"]))
    assert difference <= bound, f"{what}: differs by {difference:.2g}, {bound:.2g} allowed"
