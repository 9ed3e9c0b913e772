"""What papers report, to stand beside results of the same set and measure. None of it was measured here.

Values are the papers' own, in the unit of the measure. Protocols, splits and lengths are theirs, too: docs/published.md
says what must be the same before a number may be compared.
"""

from dataclasses import dataclass
from pathlib import Path

from medssl.files import read_csv


@dataclass(frozen=True)
class Published:
    """A number of a paper.

    Attributes:
        dataset, task, measure: as results.json calls them. init: the weights of the start. arch: the encoder.
        value: the mean, in the unit of results.json: AUROC in [0, 1], pooled Dice and AP × 100.
        protocol: the one of ours that is theirs, as far as it is known.
        source: paper and table.
    """

    dataset: str
    task: str
    measure: str
    init: str
    arch: str
    value: float
    protocol: str
    source: str


def rows() -> list[Published]:
    """All of published.csv."""
    table = read_csv(Path(__file__).with_suffix(".csv"))
    return [Published(**{**row, "value": float(row["value"])}) for row in table]


def of(dataset: str, task: str) -> list[Published]:
    """What papers report of a set, of MedMNIST's those of 28 pixels, and a task."""
    return [row for row in rows() if row.task == task and dataset in (row.dataset, f"{row.dataset}_28")]
