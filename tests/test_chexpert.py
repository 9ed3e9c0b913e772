"""CheXpert: policies, views, splits by patient, and `--ratio` that parts patients, for both kinds of training."""

import gzip
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from medssl import (
    evaluate_features,
    finetune_classification,
    train_c2l,
    train_insdis,
    train_moco,
    train_pcrl,
    train_pcrlv2,
)
from medssl.datasets import chexpert
from medssl.datasets.base import ImageDataset, Info, Request
from medssl.datasets.registry import open_labelled, open_pretraining, open_splits
from medssl.errors import InputError, run_script
from medssl.preprocess import make_lists
from medssl.reading.tables import write_list

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *chexpert.LABELS]
SPLITS = ("train", "val", "test")


def labels_of(number):
    """A patient's labels as the table writes them: blank, or by the patient's number."""
    values = {
        "No Finding": "1.0",
        "Cardiomegaly": "-1.0" if number % 3 == 0 else "1.0",
        "Edema": ["0.0", "1.0", "-1.0"][number % 3],
        "Atelectasis": "1.0" if number % 2 else "0.0",
    }
    return [values.get(name, "") for name in chexpert.LABELS]


def views_of(number):
    """Every second patient has two frontal views, every third a lateral one, every fifth nothing else."""
    views = ["frontal"] * (1 + number % 2) + ["lateral"] * (number % 3 == 0)
    return ["lateral"] if number % 5 == 0 else views


def make(root, name="CheXpert-v1.0-small", end="", stem=""):
    """Forty patients to train on and five to test on; the set's own folder."""
    home = root / name
    for part, numbers in (("train", range(1, 41)), ("valid", range(41, 46))):
        rows = [",".join(HEADER)]
        for number in numbers:
            for i, view in enumerate(views_of(number), 1):
                path = f"{part}/patient{number:05d}/study1/view{i}_{view}.jpg"
                (home / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), number, np.uint8)).save(home / path)
                line = [f"CheXpert-v1.0-small/{path}", "Male", "60", view.title(), "AP", *labels_of(number)]
                rows.append(",".join(line))
        text = "\n".join(rows).encode()
        (home / f"{stem}{part}.csv{end}").write_bytes(gzip.compress(text) if end else text)
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make(tmp_path_factory.mktemp("data"))


def opened(home, splits=SPLITS, **more):
    return open_splits(Request(name="chexpert", data=str(home), image_size=16, **more), splits)


def numbers(data):
    return [int(patient[7:]) for patient in data.patients]


def column(data, name):
    return data.labels[:, chexpert.REPORTED.index(name)]


def test_official_splits(home):
    splits = opened(home, view="all")
    assert splits["train"].info == Info("chexpert", task="multi-label", classes=chexpert.REPORTED)
    assert [len(set(data.patients)) for data in splits.values()] == [36, 4, 5]
    assert sum(map(len, splits.values())) == sum(len(views_of(number)) for number in range(1, 46))
    for split, data in splits.items():
        for i, number in enumerate(numbers(data)):
            assert data.ids[i].startswith(f"{'valid' if split == 'test' else 'train'}/patient{number:05d}/study1/view")
            assert data.labels[i, 0] == number % 2
            assert (data.labels[i, [2, 4]] == 0).all()  # blank
            assert data[i]["image"].unique().item() == number
    assert splits["test"].ids[0] == "valid/patient00041/study1/view1_frontal.jpg"


@pytest.mark.parametrize(("policy", "low", "high"), [("ones", 1, 1), ("zeros", 0, 0), ("ignore", None, None),
                                                     ("lsr-zeros", 0, 0.3), ("lsr-ones", 0.55, 0.85),
                                                     (None, 0.55, 0.85)])  # fmt: skip
def test_policies(home, policy, low, high):
    splits = opened(home, uncertain=policy)
    train = splits["train"]
    uncertain = torch.tensor([number % 3 == 0 for number in numbers(train)])
    values = column(train, "Cardiomegaly")
    assert (values[~uncertain] == 1).all()
    if low is None:
        assert values[uncertain].isnan().all()
    else:
        assert ((values[uncertain] >= low) & (values[uncertain] <= high)).all()
    assert column(train, "Edema")[[number % 3 == 1 for number in numbers(train)]].eq(1).all()
    for split in ("val", "test"):  # certain labels judge, whatever the policy
        values = column(splits[split], "Cardiomegaly")
        assert values.isnan().tolist() == [number % 3 == 0 for number in numbers(splits[split])]
        assert values.isnan().any()


def test_smoothed_labels_depend_on_the_image_and_the_label_alone(home):
    whole = opened(home, ["train"], view="all")["train"]
    smoothed = [value for value in whole.labels.flatten().tolist() if value not in (0, 1)]
    assert len(set(smoothed)) == len(smoothed) > 20
    rows = dict(zip(whole.ids, whole.labels))
    for data in (opened(home, ["train"])["train"], opened(home, view="all")["train"]):
        assert all(torch.equal(rows[name], row) for name, row in zip(data.ids, data.labels))


def test_smoothed_labels_are_uniform():
    names = [f"train/patient{i:05d}/study1/view1_frontal.jpg" for i in range(4000)]
    for policy, low, high in (("lsr-ones", 0.55, 0.85), ("lsr-zeros", 0.0, 0.3)):
        values = chexpert.settle(torch.full((4000, 5), -1.0), names, policy)
        assert values.min() >= low
        assert values.max() <= high
        assert values.mean(0).sub((low + high) / 2).abs().max() < 5 * 0.3 / math.sqrt(12 * 4000)
        assert values.std(0).sub(0.3 / math.sqrt(12)).abs().max() < 0.005
        assert torch.corrcoef(values.T).fill_diagonal_(0).abs().max() < 0.08
    kept = chexpert.settle(torch.tensor([[0.0, 1, torch.nan, -1, 0]]), names[:1], "ones")
    assert torch.equal(kept.nan_to_num(9), torch.tensor([[0.0, 1, 9, 1, 0]]))


def test_views(home):
    by_view = {view: opened(home, view=view) for view in ("frontal", "lateral", "all")}
    for split in SPLITS:
        ids = {view: splits[split].ids for view, splits in by_view.items()}
        assert all("_frontal" in name for name in ids["frontal"])
        assert all("_lateral" in name for name in ids["lateral"])
        assert sorted(ids["frontal"] + ids["lateral"]) == sorted(ids["all"])
    assert opened(home)["train"].ids == by_view["frontal"]["train"].ids
    # Patients without frontal views move nobody: pre-training on all views sees no patient that validates.
    assert not set(by_view["all"]["train"].patients) & set(by_view["frontal"]["val"].patients)
    assert opened(home, ["train"], view="all")["train"].ids == by_view["all"]["train"].ids


def test_layouts(home, tmp_path):
    wanted = opened(home)
    parent = opened(home.parent)
    assert {split: data.ids for split, data in parent.items()} == {split: data.ids for split, data in wanted.items()}
    assert parent["train"][0]["image"].shape == (1, 32, 32)
    renamed = opened(make(tmp_path, "mine", ".gz", "chexpert_"))
    assert renamed["train"].ids == wanted["train"].ids
    assert torch.equal(renamed["train"].labels.nan_to_num(9), wanted["train"].labels.nan_to_num(9))


def test_a_partial_copy_is_used_with_a_warning(tmp_path, capsys):
    home = make(tmp_path)
    whole = opened(home)
    for number in range(1, 11):
        (home / f"train/patient{number:05d}").rename(tmp_path / f"{number}")
    part = opened(home)
    assert part["val"].ids == [name for name, number in zip(whole["val"].ids, numbers(whole["val"])) if number > 10]
    assert part["train"].ids == [n for n, number in zip(whole["train"].ids, numbers(whole["train"])) if number > 10]
    assert "results are not those of the official split" in capsys.readouterr().err


# Lists ---------------------------------------------------------------------------------------------


def lists_of(home, output, *more):
    make_lists.main(["--dataset", "chexpert", "--data", str(home), "--output", str(output), *more])
    names = (("list", "train"), ("val_list", "valid"), ("test_list", "test"))
    return {name: str(output / f"chexpert_{split}.txt") for name, split in names}


@pytest.mark.parametrize("view", ["frontal", "all"])
def test_made_lists_are_what_the_set_does_itself(home, tmp_path, view):
    lists = lists_of(home.parent, tmp_path, "--view", view)
    for policy in (None, "ignore", "zeros"):
        own = opened(home, uncertain=policy, view=view)
        for split, data in opened(home, uncertain=policy, **lists).items():
            assert data.ids == own[split].ids
            assert torch.equal(data.labels.nan_to_num(9), own[split].labels.nan_to_num(9))
    ones = opened(home, **lists_of(home, tmp_path / "ones", "--view", view, "--uncertain", "ones"))
    assert torch.equal(ones["train"].labels, opened(home, view=view, uncertain="ones")["train"].labels)
    assert column(ones["test"], "Cardiomegaly").eq(1).all()  # the list says so


def test_lists_of_names_and_of_the_five_labels(home, tmp_path, capsys):
    own = opened(home)["train"]
    names = tmp_path / "names.txt"
    names.write_text("".join(f"CheXpert-v1.0-small/{name}\n" for name in own.ids))
    listed = opened(home.parent, list=str(names))
    assert listed["train"].ids + listed["val"].ids == sorted(listed["train"].ids) + listed["val"].ids
    assert sorted(listed["train"].ids + listed["val"].ids) == own.ids
    assert len(set(listed["val"].patients)) == 3  # of the 29 with frontal views
    assert listed["test"].ids == opened(home)["test"].ids
    assert "no --val-list, so a tenth of its patients validates" in capsys.readouterr().err
    assert torch.equal(opened(home, ["train"], list=str(names))["train"].labels, own.labels)
    five = tmp_path / "five.txt"
    write_list(five, own.ids[:1], torch.tensor([[0.0, 1, 0, -1, 1]]))
    assert opened(home, ["train"], list=str(five), uncertain="ones")["train"].labels.tolist() == [[0, 1, 0, 1, 1]]


def test_leaks_are_said(home, tmp_path, capsys):
    train, test = (opened(home)[split].ids for split in ("train", "test"))
    leaky = tmp_path / "leaky.txt"
    write_list(leaky, [*train[:3], *test[:2]])
    opened(home, ["train"], list=str(leaky))  # pre-training
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {leaky}: 2 of its 5 images are in the official test set ({home}/valid.csv); a")
    assert error.endswith("for a model that trains on them\n")
    clean, val = tmp_path / "clean.txt", tmp_path / "val.txt"
    write_list(clean, train[:3])
    opened(home, ["train"], list=str(clean))
    assert capsys.readouterr().err == ""
    write_list(val, test)
    with pytest.raises(InputError, match="val and test share 6 images"):
        opened(home, list=str(clean), val_list=str(val), test_list=str(val))
    assert "for a model that chooses models on them" in capsys.readouterr().err
    with pytest.raises(InputError, match="val and test share"):
        opened(home, list=str(clean), val_list=str(val))


# Which part is for pre-training --------------------------------------------------------------------


def both_parts(**options):
    """What pre-training and fine-tuning take."""
    common = {"d": None, "data": None, "list": None, "cache": None, "image_size": 16, "view": None, **options}
    return open_pretraining(Namespace(**common)), open_labelled(Namespace(**common))


@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("source", ["official", "lists", "one list", "shuffled"])
def test_the_ratio_parts_patients(home, tmp_path, ratio, source):
    given = {}
    if source != "official":
        given = lists_of(home, tmp_path, "--view", "all")
    if source in ("one list", "shuffled"):
        given = {"list": given["list"]}
    if source == "shuffled":
        path = tmp_path / "chexpert_train.txt"
        lines = np.random.default_rng(0).permutation(path.read_text().splitlines())
        path.write_text("\n".join(lines))
    options = {"dataset": "chexpert", "data": str(home), **given}
    if source == "official":
        options["view"] = "all"
    before, splits = both_parts(**options, ratio=ratio)
    whole = open_splits(Request(name="chexpert", data=str(home), **given, view=options.get("view")), ["train"])["train"]
    assert not set(before.patients) & set(splits["train"].patients)
    held = set() if source in ("official", "lists") else set(splits["val"].patients)
    assert set(before.ids) | set(splits["train"].ids) | {
        name for name, patient in zip(whole.ids, whole.patients) if patient in held
    } == set(whole.ids)
    # The first R of the list, and of its last patient what is beyond: at most two images more here.
    wanted = round(ratio * len(whole))
    assert wanted <= len(before) <= wanted + 2
    assert before.ids == [name for name in whole.ids if name in set(before.ids)]
    if source != "shuffled":
        assert before.ids == whole.ids[: len(before)]


def test_other_views_and_partial_copies_part_the_same_patients(home, tmp_path):
    part = make(tmp_path)
    for number in (2, 3, 5, 8, 13, 21):
        (part / f"train/patient{number:05d}").rename(tmp_path / f"{number}")
    options = {"dataset": "chexpert", "data": str(home), "view": "all"}
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        before, after = both_parts(**options, ratio=ratio)
        everybody = set(before.patients) | set(after["train"].patients)
        for other in ({"view": "frontal"}, {"view": "lateral"}, {"data": str(part)}):
            first, rest = both_parts(**{**options, **other}, ratio=ratio)
            assert set(first.patients) <= set(before.patients)
            assert set(rest["train"].patients) <= everybody - set(before.patients)


def test_without_patients_the_ratio_parts_images():
    data = ImageDataset(Info("other"), lambda i: np.zeros((8, 8), np.uint8), list("abcdefghij"))
    first, rest = data.parted(0.3)
    assert (list(first), list(rest)) == ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9])
    data.patients, data.order = list("ppqqqrrsst"), list("ppqqqrrsst")
    assert data.parted(0.3) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert data.parted(0.2) == ([0, 1], [2, 3, 4, 5, 6, 7, 8, 9])
    assert data.parted(0.0) == ([], list(range(10)))
    assert data.parted(1.0) == (list(range(10)), [])
    data.patients = data.order = list("pqrstpqrst")  # no neighbours
    assert data.parted(0.3) == ([0, 1, 5, 6], [2, 3, 4, 7, 8, 9])


def test_ratios_that_leave_nothing(home):
    options = {"dataset": "chexpert", "data": str(home)}
    with pytest.raises(InputError, match="--ratio 0.001: leaves none of"):
        both_parts(**options, ratio=0.001)
    with pytest.raises(InputError, match="--ratio 1: leaves no image to fine-tune on"):
        both_parts(**options, ratio=1.0)


# Bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Atelectasis", "Collapse"), "line 1: no column 'Atelectasis'; is this CheXpert's"),
        (lambda text: text.replace("-1.0", "2.0", 1), r"line 4: label '2.0'; labels must be 1, 0, -1 or blank"),
        (lambda text: text.replace("Frontal,AP", "Oblique,AP", 1), "line 2: view 'Oblique' is neither Frontal nor"),
        (lambda text: text.replace("patient00001", "p1", 1), "line 2: no patient in the path train/p1/study1/view1"),
        (lambda text: text.replace("view2_frontal", "view1_frontal", 1), "train/.*view1_frontal.jpg is there twice"),
        (lambda text: text[:-30], r"line \d+: \d+ columns of 19; is the file whole"),
        (lambda text: text.splitlines()[0], "train.csv: has no images"),
        (lambda text: "", "line 1: no column 'Path'"),
    ],
)
def test_bad_tables(tmp_path, change, message):
    home = make(tmp_path)
    table = home / "train.csv"
    table.write_text(change(table.read_text()))
    for use in (lambda: opened(home, ["train"]), lambda: lists_of(home, tmp_path / "lists")):
        with pytest.raises(InputError, match=f"train.csv.*{message}|{message}") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_damaged_tables(tmp_path):
    home = make(tmp_path, end=".gz")
    table = home / "train.csv.gz"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(InputError, match="train.csv.gz: cannot be read; is it whole"):
        opened(home)
    table.write_bytes(gzip.compress("Path,Größe".encode("latin-1")))
    with pytest.raises(InputError, match="not a table in UTF-8; is this CheXpert's table"):
        opened(home)


def test_bad_folders(home, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        opened(tmp_path / "gone")
    with pytest.raises(InputError, match="not a folder"):
        opened(home / "train.csv")
    with pytest.raises(InputError, match="no images in train/ or valid/"):
        opened(tmp_path)
    bare = make(tmp_path)
    (bare / "valid.csv").unlink()
    with pytest.raises(InputError, match="images are for test; give --test-list, or put the official train.csv and"):
        opened(bare)
    assert len(opened(bare, ["train"])["train"]) > 0
    (bare / "train").rename(tmp_path / "away")
    with pytest.raises(InputError, match="none of its images for train is in"):
        opened(bare, ["train"])
    (bare / "train.csv").unlink()
    with pytest.raises(InputError, match="nothing says which images are for train; give --list, or put"):
        opened(bare, ["train"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train/patient00001/study1/view9_frontal.jpg",
            "line 2: train/patient00001/study1/view9_frontal.jpg is not in",
        ),
        ("CheXpert-v1.0/./train/patient00002/study1/view1_frontal.jpg", "is listed on line 1 already"),
    ],
)
def test_bad_lists(home, tmp_path, line, message):
    path = tmp_path / "l.txt"
    path.write_text(f"train/patient00002/study1/view1_frontal.jpg\n{line}\n")
    with pytest.raises(InputError, match=message):
        opened(home, ["train"], list=str(path))


@pytest.mark.parametrize(
    ("labels", "message"),
    [("0 1", "line 1: 2 labels; chexpert's lists have 14, or the 5"), ("0 0 2 0 0", "label 2 of")],
)
def test_bad_labels(home, tmp_path, labels, message):
    path = tmp_path / "l.txt"
    path.write_text(f"train/patient00002/study1/view1_frontal.jpg {labels}\n")
    with pytest.raises(InputError, match=message):
        opened(home, ["train"], list=str(path))


def test_options_that_would_do_nothing(home, tmp_path):
    for name in ("phantom2d", "pneumoniamnist", "folder"):
        for option, value in (("view", "all"), ("uncertain", "ones")):
            with pytest.raises(InputError, match=f"--{option} {value}: is for chexpert, not for {name}; leave it out"):
                open_splits(Request(name=name, data=str(home), **{option: value}), ["train"])
    lists = lists_of(home, tmp_path)
    with pytest.raises(InputError, match="--view all: the lists say which images"):
        opened(home, view="all", **lists)
    assert "lateral" in " ".join(opened(home, view="all", list=lists["list"])["test"].ids)  # valid.csv's
    certain = lists_of(home, tmp_path, "--uncertain", "zeros")
    with pytest.raises(InputError, match="--uncertain ones: .*chexpert_train.txt has no uncertain label"):
        opened(home, uncertain="ones", **certain)
    lateral = make(tmp_path / "frontal")
    text = [line for line in (lateral / "valid.csv").read_text().splitlines() if "lateral" not in line]
    (lateral / "valid.csv").write_text("\n".join(text))
    with pytest.raises(InputError, match="--view lateral: .*valid.csv has no such images for test; choose another"):
        opened(lateral, view="lateral")


# Scripts -------------------------------------------------------------------------------------------


def test_scripts_have_the_options_that_act_in_them():
    for script in (train_c2l, train_insdis, train_moco, train_pcrl, train_pcrlv2):
        args = script.get_parser().parse_args(["--dataset", "chexpert", "--view", "all"])
        assert args.view == "all"
        assert not hasattr(args, "uncertain")
    for script in (finetune_classification, evaluate_features):
        more = ["--init", "random"] if script is evaluate_features else []
        args = script.get_parser().parse_args(["--dataset", "chexpert", "--uncertain", "lsr-zeros", *more])
        assert (args.view, args.uncertain) == (None, "lsr-zeros")


def test_fine_tuning_on_chexpert(home, tmp_path):
    run = [
        *("--dataset", "chexpert", "--data", str(home), "--ratio", "0.5", "--image-size", "32", "--steps", "2"),
        *("--workers", "0", "--device", "cpu", "--b", "8", "--no-tensorboard", "--output", str(tmp_path)),
    ]
    finetune_classification.main(run)
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + len(opened(home)["test"])
    assert "Pleural Effusion" in rows[0]


def test_a_wrong_option_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        run_script(
            lambda: finetune_classification.main(["--view", "all", "--device", "cpu", "--output", str(tmp_path)])
        )
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --view all: is for chexpert, not for phantom2d; leave it out\n"
