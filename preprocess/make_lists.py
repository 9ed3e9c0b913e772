"""Write train, validation and test lists from a set's own metadata, split by patient.

    python preprocess/make_lists.py --dataset chest --data DIR --split official
    python preprocess/make_lists.py --dataset chexpert --data DIR --split random --seed 1 --uncertain zeros

Only the metadata is read: `Data_Entry_2017*.csv[.gz]` (chest), `train.csv` and `valid.csv`, also gzipped and named
`chexpert_train.csv.gz` (chexpert). The lists `OUTPUT/<set>_{train,valid,test}.txt` have a line an image: its name, or
its path from `train/` or `valid/` on, then its 14 labels. They are for the same `--dataset`; of CheXpert's, that uses
the five reported ones, and where a label is -1, what its own `--uncertain` says.

`--split official` takes the set's own test images (CheXpert: valid.csv) and a seeded share of the other patients
for validation; with the default seed and share these are the patients that `--dataset` itself holds out. Of sets with
masks it takes the split that `--dataset` makes itself; their lists hold the images (of lits the volumes), and where
their names tell it, whether they show tuberculosis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medssl.datasets import chexpert, lits, lungs, registry, vessels
from medssl.datasets.base import Request
from medssl.datasets.chest import FINDINGS, patients_of, read_entries
from medssl.datasets.splits import HELD_OUT, SPLIT_SEED, SPLITS, split_by_patient
from medssl.engine import options
from medssl.engine.options import Parser
from medssl.errors import InputError, run_script
from medssl.reading.tables import read_list, write_list

CASES = {"lits": lits, "lungs": lungs, "vessels": vessels}  # families that find cases, and split them
OF_CASES = {row.name: CASES[row.module] for row in registry.ROWS if row.module in CASES}
UNCERTAIN = {"ones": 1, "zeros": 0, "ignore": -1}


@dataclass(frozen=True)
class Table:
    """Images of a set: names, labels (N, L) float32 of 0, 1 and −1 (not known), and patients."""

    names: list[str]
    labels: Tensor
    patients: list[str]

    def rows(self, chosen: Sequence[int]) -> "Table":
        """The images at the positions `chosen`."""
        return Table([self.names[i] for i in chosen], self.labels[list(chosen)], [self.patients[i] for i in chosen])


def get_parser() -> Parser:
    """The options of this script."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=("chest", "chexpert", *sorted(OF_CASES)), required=True, help="which set")
    group.add_argument("--data", metavar="DIR", required=True, help="the folder with its metadata")
    group.add_argument("--output", metavar="DIR", default="train_val_txt", help="where the lists go")
    group = parser.add_argument_group("split")
    group.add_argument(
        "--split", choices=("official", "random"), default="official", help="whose images are for testing"
    )
    group.add_argument("--seed", type=options.non_negative_int, default=SPLIT_SEED, help="seed of what is drawn")
    group.add_argument(
        "--val-fraction", type=options.fraction, default=HELD_OUT, help="share of the patients for validation"
    )
    group.add_argument(
        "--test-fraction", type=options.fraction, default=0.2, help="share of the patients for testing (random)"
    )
    group = parser.add_argument_group("chexpert")
    group.add_argument(
        "--uncertain",
        choices=tuple(UNCERTAIN),
        default="ignore",
        help="what uncertain labels become; ignore leaves them -1, so that training chooses",
    )
    group.add_argument(
        "--view", choices=("frontal", "lateral", "all"), default=chexpert.VIEW, help="views that are listed"
    )
    return parser


def chexpert_splits(
    folder: Path, split: str, val_fraction: float, test_fraction: float, seed: int, uncertain: str, view: str
) -> dict[str, Table]:
    """CheXpert's images by split; the arguments are this script's options."""
    files = chexpert.tables_in(folder)
    if "train" not in files:
        raise InputError(f"--data {folder}: no train.csv there")

    def seen(whole: chexpert.Table, chosen: Sequence[int]) -> Table:
        rows = [i for i in chosen if view in ("all", whole.views[i])]
        labels = torch.where(whole.labels < 0, UNCERTAIN[uncertain], whole.labels)
        return Table(whole.names, labels, whole.patients).rows(rows)

    # Patients are drawn before views are chosen: they are the same for every view.
    train = chexpert.read_table(files["train"])
    if split == "random":
        drawn = random_split(train.patients, val_fraction, test_fraction, seed)
        return {part: seen(train, rows) for part, rows in drawn.items()}
    if "valid" not in files:
        raise InputError(f"--data {folder}: no valid.csv, the official test images; use --split random")
    rest, val = split_by_patient(train.patients, val_fraction, seed)
    test = chexpert.read_table(files["valid"])
    return {"train": seen(train, rest), "valid": seen(train, val), "test": seen(test, range(len(test.names)))}


def chest_splits(folder: Path, split: str, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Table]:
    """ChestX-ray14's images by split; the arguments are this script's options."""
    entries = read_entries(folder)
    if entries is None:
        raise InputError(f"--data {folder}: no Data_Entry_2017*.csv there")

    def table(names: list[str]) -> Table:
        return Table(names, entries.labels(names), patients_of(names, entries))

    if split == "random":
        whole = table(list(entries.findings))
        drawn = random_split(whole.patients, val_fraction, test_fraction, seed)
        return {part: whole.rows(rows) for part, rows in drawn.items()}
    official = {}
    for file in ("train_val_list.txt", "test_list.txt"):
        if not (folder / file).is_file():
            raise InputError(f"--data {folder}: no {file} there; download it, or use --split random")
        official[file] = read_list(folder / file)[0]
        unknown = [name for name in official[file] if name not in entries.findings]
        if unknown:
            raise InputError(f"{folder / file}: {unknown[0]} is not in Data_Entry_2017*.csv")
    rest = table(official["train_val_list.txt"])
    train, val = split_by_patient(rest.patients, val_fraction, seed)
    return {"train": rest.rows(train), "valid": rest.rows(val), "test": table(official["test_list.txt"])}


def masked_splits(
    name: str, folder: Path, split: str, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, Table]:
    """Images of a set with masks by split; the arguments are this script's options."""
    request, module = Request(name, str(folder)), OF_CASES[name]
    if split == "official":
        own = module.split_cases(request, SPLITS)
        parts = {"train": own["train"], "valid": own["val"], "test": own["test"]}
    else:
        cases = module.find_cases(request)
        drawn = random_split([case.patient for case in cases], val_fraction, test_fraction, seed)
        parts = {part: [cases[i] for i in rows] for part, rows in drawn.items()}
    return {
        part: Table(
            [case.id for case in own],
            torch.tensor([[case.label] for case in own if case.label is not None], dtype=torch.float32),
            [case.patient for case in own],
        )
        for part, own in parts.items()
    }


def random_split(patients: Sequence[str], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[int]]:
    """Draw validation and test patients; fractions are of all patients. Positions of the images of each split."""
    if val_fraction + test_fraction >= 1:
        raise InputError("--val-fraction and --test-fraction leave nothing to train on; lower them")
    rest, test = split_by_patient(patients, test_fraction, seed)
    train, val = split_by_patient([patients[i] for i in rest], val_fraction / (1 - test_fraction), seed)
    return {"train": [rest[i] for i in train], "valid": [rest[i] for i in val], "test": test}


def refuse_overlap(splits: dict[str, Table]) -> None:
    """Raise InputError where two splits share a patient."""
    for one, two in (("train", "valid"), ("train", "test"), ("valid", "test")):
        shared = set(splits[one].patients) & set(splits[two].patients)
        if shared:
            raise InputError(
                f"{one} and {two} share {len(shared)} patients, such as {min(shared)}; "
                "the set's own lists are not what they should be: download them again, or use --split random"
            )


def report(splits: dict[str, Table], classes: Sequence[str]) -> str:
    """A table of images, patients, and positives (and unknown labels where there are any) of each split."""
    lines = [f"{'':28}" + "".join(f"{split:>16}" for split in splits)]
    lines.append(f"{'images':28}" + "".join(f"{len(table.names):>16}" for table in splits.values()))
    lines.append(f"{'patients':28}" + "".join(f"{len(set(table.patients)):>16}" for table in splits.values()))
    for number, name in enumerate(classes):
        cells = []
        for table in splits.values():
            column = table.labels[:, number]
            unknown = int((column < 0).sum())
            cells.append(f"{int((column > 0).sum())}" + (f" ({unknown} ?)" if unknown else ""))
        lines.append(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the lists and print what is in them."""
    parser = get_parser()
    args = parser.parse_args(argv)
    folder = Path(args.data)
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder")
    ignored = options.changed(parser, args, ("uncertain", "view")) if args.dataset != "chexpert" else ()
    if ignored:
        raise InputError(f"{ignored[0]}: is for chexpert, not for {args.dataset}; leave it out")
    drawn = {
        **{"split": args.split, "seed": args.seed},
        **{"val_fraction": args.val_fraction, "test_fraction": args.test_fraction},
    }
    if args.dataset == "chest":
        classes, splits = FINDINGS, chest_splits(folder, **drawn)
    elif args.dataset in OF_CASES:
        if args.split == "official":
            changed = options.changed(parser, args, ("seed", "val_fraction", "test_fraction"))
            if changed:
                raise InputError(f"{changed[0]}: {args.dataset}'s own split is fixed; leave it out")
        splits = masked_splits(args.dataset, folder, **drawn)
        classes = lungs.TUBERCULOSIS[1:] if len(splits["train"].labels) else ()
    else:
        classes = chexpert.LABELS
        splits = chexpert_splits(folder, **drawn, uncertain=args.uncertain, view=args.view)
    # An empty split comes from a fraction of 0, from too few patients, or from a view that its patients lack.
    for split, table in splits.items():
        if not table.names:
            raise InputError(
                f"no images for {split}; raise --val-fraction and --test-fraction, or choose another --view"
            )
    refuse_overlap(splits)
    print(report(splits, classes))
    for split, table in splits.items():
        path = Path(args.output) / f"{args.dataset}_{split}.txt"
        write_list(path, table.names, table.labels if len(table.labels) else None)
        print(f"wrote {path}")


def cli() -> None:
    """Console command."""
    run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
