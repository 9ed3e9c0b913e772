"""Every way in which the project reads a file, with a small valid file for each, for `endure_files.py` to damage."""

import argparse
import gzip
import io
import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from medssl import prepare_models
from medssl.benchmarks import damage
from medssl.benchmarks.damage import Change
from medssl.datasets import cache as caches
from medssl.datasets import chest, chexpert, folder, luna, medmnist, pathology
from medssl.datasets.base import Files, ImageDataset, Info, Request
from medssl.engine import monitor, runs, state
from medssl.engine.method import Method
from medssl.engine.parallel import Devices
from medssl.errors import InputError
from medssl.models.encoders import initialise
from medssl.preprocess import luna as prepared
from medssl.preprocess.check_data import examine
from medssl.reading.geometry import Volume
from medssl.reading.masks import read_labels, read_mask
from medssl.reading.simpleitk import simpleitk
from medssl.reading.tables import read_list, read_patients
from medssl.reading.volumes import read_header, read_volume
from medssl.study import report, results
from medssl.study.jobs import Job
from medssl.tasks import trials


@dataclass(frozen=True)
class Reader:
    """A way to read a file.

    Attributes:
        name: in words.
        make: writes valid files into an empty folder.
        read: reads them from a folder as the project does; what it raises for damaged ones is judged.
        change: what is changed of a header, or of what else the format says of itself.
        victims: pattern of the files in the folder of which one is damaged.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    change: Change
    victims: str = "*"


def noise(*shape: int) -> np.ndarray:
    """Numbers from 0 to 255, uint8, the same in every process."""
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


# Pictures ------------------------------------------------------------------------------------------


def pictures(name: str, change: Change, *variants: tuple[np.ndarray, dict]) -> Reader:
    """A format of pictures, with a file for each variant."""

    def make(place: Path) -> None:
        for i, (array, more) in enumerate(variants):
            Image.fromarray(array).save(place / f"{i}.{name}", **more)

    def read(place: Path) -> None:
        for path in sorted(place.glob(f"*.{name}")):
            examine(path)  # which takes an UnreadableImage for an answer
            data = ImageDataset(Info("x", 2, 3), Files([path]), ["a"], texture_size=8)
            data.load(0)
            read_mask(path)

    return Reader(f"picture {name}", make, read, change)


def write_dicom(path: Path, number: int = 0, picture: bool = False) -> None:
    """A slice of a CT, or a radiograph with what radiographs have besides."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"1.2.3.{number + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, f"1.2.3.{number + 1}"
    data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", "1.2.3", "1.2"
    data.ImagePositionPatient, data.ImageOrientationPatient = [5, -7, number * 2.5], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [0.8, 0.7], 2.5, number
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 6, 8, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, -1000
    if picture:
        data.PhotometricInterpretation, data.NumberOfFrames = "MONOCHROME1", 1
        data.WindowCenter, data.WindowWidth, data.PixelPaddingValue = 40, 400, 0
    data.PixelData = (noise(6, 8).astype(np.uint16) * 16).tobytes()
    data.save_as(path, enforce_file_format=True)


def make_series(place: Path, change: Callable[[Path], object] | None = None) -> None:
    for number in range(4):
        write_dicom(place / f"{number}.dcm", number)
        if change:
            change(place / f"{number}.dcm")


def read_series(place: Path) -> None:
    """As folders of volumes do; voxels that no file holds would be memory of something else."""
    folder.is_series(place)
    read_scan(place)
    count = read_volume(place).array.size
    held = sum(map(values_in, place.iterdir()))
    if count > held:
        raise RuntimeError(f"{count} voxels were read of files that hold {held}")


def values_in(path: Path) -> float:
    """How many values a DICOM file holds, at most."""
    import pydicom

    try:
        data = pydicom.dcmread(path, force=True)
        if data.file_meta.TransferSyntaxUID.is_encapsulated:
            return math.inf
        return 8 * len(data.PixelData) // data.BitsAllocated
    except Exception:
        return math.inf  # of a file that pydicom does not read, nobody knows


def make_alike(place: Path) -> None:
    """Makes a series of a slice, so that what is damaged is the same in all."""
    data = (place / "0.dcm").read_bytes()
    for number in range(1, 4):
        (place / f"{number}.dcm").write_bytes(data.replace(b"5\\-7\\0.0", b"5\\-7\\%d.0" % number))


def deflate_dicom(path: Path) -> None:
    import pydicom

    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(path)


def encapsulate_dicom(kind: str) -> Callable[[Path], None]:
    """Brings a DICOM file into one of the compressed syntaxes that every reader knows: "RLE" or "JPEG2000"."""

    def bring(path: Path) -> None:
        import pydicom

        data = pydicom.dcmread(path)
        data.Rows = data.Columns = 64  # GDCM does not read run lengths of less
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelData = 7, noise(64, 64).tobytes()
        if kind == "RLE":
            data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        else:
            packed = io.BytesIO()
            Image.fromarray(noise(64, 64)).save(packed, "JPEG2000", no_jp2=True)
            data.PixelData = pydicom.encaps.encapsulate([packed.getvalue()])
            data["PixelData"].is_undefined_length = True
            data.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000
        data.save_as(path)

    return bring


def dicoms(name: str, change: Change, bring: Callable[[Path], object] | None = None) -> list[Reader]:
    """Radiographs and series of a transfer syntax, into which `bring` brings a file."""

    def make(place: Path) -> None:
        write_dicom(place / "a.dcm", picture=True)
        if bring:
            bring(place / "a.dcm")

    def read(place: Path) -> None:
        examine(place / "a.dcm")
        Files([place / "a.dcm"])(0)

    return [
        Reader(f"DICOM picture{name}", make, read, change),
        Reader(f"DICOM series{name}", lambda place: make_series(place, bring), read_series, change),
    ]


# Volumes -------------------------------------------------------------------------------------------


def write_volume(path: Path, compressed: bool = False) -> None:
    sitk = simpleitk()
    image = sitk.GetImageFromArray(noise(3, 4, 5).astype(np.int16))
    image.SetSpacing((0.7, 0.8, 2.5))
    sitk.WriteImage(image, str(path), compressed)


def read_scan(path: Path) -> None:
    """As training, masks, checks and studies do."""
    read_header(path)
    read_volume(path)
    read_labels(path, Volume(np.zeros((5, 4, 3), np.float32), (0.7, 0.8, 2.5)))


def volumes(name: str, change: Change, victims: str = "*", compressed: bool = False) -> Reader:
    """A format of volumes."""
    end = name.split()[0]

    def make(place: Path) -> None:
        write_volume(place / f"a.{end}", compressed)

    return Reader(f"volume {name}", make, lambda place: read_scan(place / f"a.{end}"), change, victims)


NIFTI = damage.fields(
    [
        *((0, 4), (70, 2), (72, 2), (344, 4), (108, 4), (252, 2), (254, 2), (123, 1), (348, 4), (352, 4)),
        *((40 + 2 * i, 2) for i in range(8)), *((76 + 4 * i, 4) for i in range(8)),
        *((256 + 4 * i, 4) for i in range(18)),
    ]
)  # fmt: skip
META = damage.lines("=", r"ElementDataFile.*$")
NRRD = damage.lines(":", r"^$")


# Arrays --------------------------------------------------------------------------------------------


def make_cubes(place: Path) -> None:
    (place / "subset0").mkdir()
    np.save(place / "subset0" / "1.2_global_0.npy", (noise(2, 4, 4, 4) / 255).astype(np.float16))
    np.save(place / "subset0" / "1.2_local_0.npy", (noise(3, 2, 2, 2) / 255).astype(np.float64))


def read_cubes(place: Path) -> None:
    shapes = ((2, 4, 4, 4), (3, 2, 2, 2))
    paths = luna._Paths([place / "subset0" / "1.2_global_0.npy"], shapes)
    luna.LunaPairs(Info("luna", 3), paths, ["a"]).load(0)
    luna.open_splits(Request("luna", str(place)), ["train"])


def make_medmnist(flag: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        arrays = {}
        for split in medmnist.SPLITS:
            arrays |= {f"{split}_images": noise(3, *shape), f"{split}_labels": np.array([[0], [1], [0]], np.uint8)}
        np.savez_compressed(place / f"{flag}.npz", **arrays)

    return make


def read_medmnist(flag: str) -> Callable[[Path], None]:
    def read(place: Path) -> None:
        for data in medmnist.open_splits(Request(flag, str(place), image_size=16), ["train", "val"]).values():
            data.load(0)

    return read


NPZ = damage.one_of(damage.zip_fields, damage.zip_member(damage.npy))


def kept_volumes(place: Path) -> folder.VolumeFiles:
    made = folder.VolumeFiles(Info("folder", 3), [place / "a.mha"], ["a"], (4, 4, 4))
    made.kept_in = place
    return made


def make_kept(place: Path) -> None:
    write_volume(place / "a.mha")
    data = kept_volumes(place)
    data.load(0)
    (place / data._name(place / "a.mha")).rename(place / "kept.npz")


def read_kept(place: Path) -> None:
    data = kept_volumes(place)
    (place / "kept.npz").rename(place / data._name(place / "a.mha"))  # known by its path, and time of change
    item = data.load(0)
    if item["image"].ndim != 4:
        raise RuntimeError(f"an item of {item['image'].ndim} dimensions was taken from a cache")


# Caches --------------------------------------------------------------------------------------------


def cached_images(place: Path) -> ImageDataset:
    paths = sorted((place / "images").glob("*.png"))
    return ImageDataset(Info("folder"), Files(paths), [path.name for path in paths], texture_size=8)


def make_cache(place: Path) -> None:
    (place / "images").mkdir()
    for i in range(5):
        Image.fromarray(noise(9, 7) // (i + 1)).save(place / "images" / f"{i}.png")
    (place / "images" / "4.png").write_bytes(b"bad")
    caches.build(cached_images(place), place / "cache")


def read_cache(place: Path) -> None:
    data = caches.attach(cached_images(place), place / "cache")
    for i in range(4):
        data[i]


def make_begun(place: Path) -> None:
    make_cache(place)
    index = json.loads((place / "cache" / "index.json").read_text())
    notes = [
        {"block": b, "fingerprints": index["fingerprints"][b : b + 1], "sizes": index["sizes"][b : b + 1], "bad": {}}
        for b in range(3)
    ]
    (place / "cache" / "progress.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    index = {key: index[key] for key in ("version", "finished", "set", "size", "channels", "block", "ids")}
    (place / "cache" / "index.json").write_text(json.dumps({**index, "finished": False, "block": 1}))


# Checkpoints ---------------------------------------------------------------------------------------


class Small(Method):
    """A method of few parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def options_of(place: Path) -> argparse.Namespace:
    return argparse.Namespace(
        output=str(place), resume="auto", optimizer="adam", lr=0.1, momentum=0.9, weight_decay=0.0, betas=[0.9, 0.999],
        amp=False, amp_dtype="bf16", max_bad=0.01, b=2, arch=None,
    )  # fmt: skip


def run_of(place: Path) -> tuple[state.State, dict | None]:
    args, data = options_of(place), ImageDataset(Info("x"), None, ["a", "b"])
    devices = Devices(torch.device("cpu"))
    where, saved = runs.open_output(args, "Small", None, devices)
    return state.start(Small(), data, args, devices, where, saved, None), saved


def make_run(place: Path) -> None:
    made, _ = run_of(place)
    step(made)
    made.keep({"score": 0.5, "epoch": 1.0}, 0)
    made.save(place / "last.pt")


def read_run(place: Path) -> None:
    made, saved = run_of(place)
    if saved is not None:
        monitor.trim_metrics(place / "metrics.jsonl", made.step)
        made.starts_epoch()
        made.is_best({"score": 1.0})
        step(made)
        made.save(place / "last.pt")


def step(made: state.State) -> None:
    made.method.net(torch.ones(2, 1, 4, 4)).sum().backward()
    made.optimizer.step()
    made.step += 1


def tensors() -> dict[str, object]:
    """What checkpoints hold: kinds of tensors, and plain values."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "state_dict": {"a.weight": weight, "a.view": weight.t(), "a.half": weight.half(), "a.count": torch.tensor(3)},
        "args": argparse.Namespace(lr=0.1), "epoch": 3, "arch": "resnet18", "more": [1, 2.0, "x", None, (True, b"y")],
    }  # fmt: skip


def make_checkpoints(place: Path) -> None:
    torch.save(tensors(), place / "new.pt")
    torch.save(tensors(), place / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"a": torch.eye(3).to_sparse()}}, place / "sparse.pt")


def read_checkpoints(place: Path) -> None:
    """As --init does."""
    for path in sorted(place.glob("*.pt")):
        try:
            initialise(OneLayer(), "resnet18", str(path))
        except InputError as error:
            if path.name != "sparse.pt" or "no state dict" not in str(error):  # which it is
                raise


class OneLayer(nn.Module):
    """A network that the valid checkpoints have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3, bias=False)


def checkpoint_changes(data: bytes, rng, marker: str) -> bytes:
    """Of the new format or the old."""
    if data[:2] == b"PK":
        return damage.one_of(damage.zip_fields, *[damage.zip_member(damage.opcodes, "data.pkl")] * 3)(data, rng, marker)
    return damage.opcodes(data, rng, marker)


def make_byol(place: Path) -> None:
    """As Haiku's: arrays of every protocol's forms."""
    arrays = {
        "res_net50/~/initial_conv": {"w": noise(3, 3, 1, 2).astype(np.float32)},
        "res_net50/~/initial_batchnorm": {"scale": np.ones((1, 1, 1, 2), np.float32), "offset": np.zeros(2, ">f4")},
        "counter": {"n": np.float64(3), "i": np.int32(2), "f": np.asfortranarray(noise(3, 4)), "e": b"", "o": b"\xff"},
    }
    content = {"experiment_state": {"online_params": arrays, "online_state": dict(arrays)}, "step": 7}
    for protocol in (2, 4, 5):
        (place / f"{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))


def read_byol(place: Path) -> None:
    prepare_models.bare_resnet50 = small_network  # which takes a second to make
    for path in sorted(place.glob("*.pkl")):
        try:
            prepare_models.convert("byol", path)
        except InputError as error:
            if "a ResNet-50 has 53 and 53" not in str(error):  # the valid ones are too small for one
                raise


def make_prepared(place: Path) -> None:
    """A file of each other layout, whose entries repeat one number."""
    state = {key: torch.ones(1, dtype=value.dtype).expand(value.shape) if value.ndim else torch.tensor(1)
             for key, value in small_network().state_dict().items()}  # fmt: skip
    query = {f"module.encoder_q.{key}": value for key, value in state.items()}
    torch.save({"state_dict": query, "epoch": 200, "arch": "resnet50"}, place / "moco-v2.pth")
    torch.save(state, place / "supervised.pth", _use_new_zipfile_serialization=False)
    stem = {"net.0.0.weight": state["conv1.weight"], "net.0.1.0.weight": state["bn1.weight"]}
    torch.save({"resnet": stem, "head": {}}, place / "simclr-v2.pth")


def read_prepared(place: Path) -> None:
    prepare_models.bare_resnet50 = small_network
    for path in sorted(place.glob("*.pth")):
        try:
            prepare_models.read_model(path.stem, path)
        except InputError as error:
            if path.stem != "simclr-v2" or "has no bn1.bias" not in str(error):  # the valid one is a stem alone
                raise


@cache
def small_network() -> nn.Module:
    """A ResNet-50 without numbers, and without its classifier."""
    with torch.device("meta"):
        network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    return network


def make_safetensors(place: Path) -> None:
    save_file({"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}, place / "a.safetensors")


def read_safetensors(place: Path) -> None:
    initialise(OneLayer(), "resnet18", str(place / "a.safetensors"))


# Tables --------------------------------------------------------------------------------------------


def make_lists(place: Path) -> None:
    (place / "labels.txt").write_text("".join(f"a/{i:03d}.png 1 0 -1\n" for i in range(6)))
    (place / "names.txt").write_text("".join(f"b {i}.png\n" for i in range(6)))


def read_lists(place: Path) -> None:
    for path in sorted(place.glob("*.txt")):
        read_list(path)


def make_tables(place: Path) -> None:
    labels = ",".join(chexpert.LABELS)
    rows = "".join(
        f"CheXpert-v1.0/train/patient0000{i}/study1/view1_frontal.jpg,Male,60,Frontal,AP,{',1.0' * 13}\n"
        for i in range(4)
    )
    (place / "train.csv").write_text(f"Path,Sex,Age,Frontal/Lateral,AP/PA,{labels}\n{rows}")
    with gzip.open(place / "valid.csv.gz", "wt") as file:
        file.write(f"Path,Sex,Age,Frontal/Lateral,AP/PA,{labels}\n{rows}")
    entries = "".join(f"0000000{i}_000.png,Mass|Edema,0,{i},58,M\n" for i in range(4))
    (place / "Data_Entry_2017.csv").write_text(f"Image Index,Finding Labels,Follow-up #,Patient ID,Age,Sex\n{entries}")
    (place / "patients.csv").write_text("file,patient\n" + "".join(f"a/{i}.png,p{i}\n" for i in range(4)))
    nodules = "".join(f"1.2.{i},{i % 2},{i},1.5,subset{i}/1.2.{i}_nodule_0.npy\n" for i in range(4))
    (place / "nodules.csv").write_text("uid,class,fold,weight,file\n" + nodules)
    candidates = "".join(f"1.2.{i},-5.5,10,{i},{i % 2}\n" for i in range(4))
    (place / "candidates_V2.csv").write_text("seriesuid,coordX,coordY,coordZ,class\n" + candidates)


def read_tables(place: Path) -> None:
    for path in chexpert.tables_in(place).values():
        chexpert.read_table(path)
    chest.read_entries(place)
    read_patients(place)
    luna.read_nodules(place / "nodules.csv")
    prepared.read_candidates(place / "candidates_V2.csv")


def zipped_table(data: bytes, rng, marker: str) -> bytes:
    return (damage.gzipped(damage.table) if data[:2] == b"\x1f\x8b" else damage.table)(data, rng, marker)


# JSON ----------------------------------------------------------------------------------------------


def make_coco(place: Path) -> None:
    from pycocotools import mask as coco

    (place / "annotations").mkdir()
    (place / "train").mkdir()
    Image.fromarray(noise(20, 30, 3)).save(place / "train" / "a.png")
    runs = coco.encode(np.asfortranarray((noise(20, 30) > 200).astype(np.uint8)))
    shapes = [
        [[1, 1, 10, 1, 10, 10, 1, 10]], {"size": [20, 30], "counts": [100, 50, 450]},
        {"size": [20, 30], "counts": runs["counts"].decode()},
    ]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": shape}
            for i, shape in enumerate(shapes)
        ],
        "categories": [{"id": 1, "name": "gland"}],
    }
    (place / "annotations" / "train.json").write_text(json.dumps(content))


def read_coco(place: Path) -> None:
    for tile in pathology.find_coco(place):
        tile.glands()


def make_study(place: Path) -> None:
    ended = {
        "status": "finished",
        "reason": None,
        "began": "2026-01-01T00:00:00+00:00",
        "seconds": 60.0,
        "machine": "x",
    }
    for name in ("run", "pretraining", "features"):
        (place / name).mkdir()
        (place / name / "job.json").write_text(json.dumps({**ended, "options": {"steps": 4, "format": 2}}))
    classes = {name: {"auroc": 0.8, "interval": [0, 1]} for name in "ab"}
    entry = {
        "auroc": 0.7, "train_images": 10, "per_class": classes, "val_score": 0.7, "seconds": 50.0, "best_epoch": 2.0,
        "start": {"matched": 100, "missing": 3, "unexpected": 0}, "accuracy": 0.5, "f1": None, "trial": 0,
    }  # fmt: skip
    config = {"dataset": "chest", "arch": "resnet18", "epochs": 4, "data": "D"}
    versions = {"medssl": "0.1.0", "torch": "2.11", "python": "3.11"}
    made = {"trials": [entry], "config": config, "versions": versions, "device": "one GPU"}
    (place / "run" / "results.json").write_text(json.dumps(made))
    metrics = [{"step": k, "epoch": k / 2, "loss": 2.0, "contrast": 1.0, "lr": 0.1, "score": 0.3} for k in range(4)]
    (place / "pretraining" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (place / "pretraining" / "config.json").write_text(
        json.dumps({"epochs": 3, "b": 8, "device": "one GPU", "data": "E"})
    )
    (place / "pretraining" / "encoder.pt").touch()
    values = {"auroc": 0.7, "accuracy": None}
    (place / "features" / "features.json").write_text(json.dumps({"results": [{"knn": values, "probe": values}]}))


def read_study(place: Path) -> None:
    """As a study that goes on, and its report, do."""
    pretraining = Job("pre-training", "train_magical", (), place / "pretraining", "encoder.pt")
    features = Job("features", "evaluate_features", (), place / "features", "features.json")
    job = Job("run", "finetune_classification", ("--init", "x"), place / "run", "results.json", needs=pretraining)
    cell = results.Cell("classification", 1, "x", 0, "auroc", job)
    found = {cell: cell.results()}
    rows = results.gather([cell])
    for one in (pretraining, features, job):
        one.failed()
        report.run_line(1, one, one.record())
        if "options" in one.record():
            runs.refuse_changes(one.record()["options"], {"steps": 4, "format": 2}, one.folder)
    report.runs_summary([(one, one.record()) for one in (pretraining, features, job)])
    report.warnings(rows, found, [pretraining, features, job])
    report.findings(rows)
    report.class_table(rows)
    report.measures_table(rows)
    monitor.trim_metrics(place / "pretraining" / "metrics.jsonl", 2)
    monitor.loss_names(monitor.read_lines(place / "pretraining" / "metrics.jsonl"))
    if features.finished():
        report.features_section(features)


def make_trials(place: Path) -> None:
    config = {**vars(trial_options(place)), "format": 2}
    (place / "trial_0").mkdir()
    (place / "trial_0" / "config.json").write_text(json.dumps(config))
    (place / "config.json").write_text(json.dumps({**config, "data_digest": "x"}))
    entry = {"trial": 0, "seed": 0, "auroc": 0.7, "accuracy": 0.6, "val_score": 0.7, "seconds": 5.0, "limit": 4}
    (place / "trial_0" / "result.json").write_text(json.dumps(entry))


def trial_options(place: Path) -> argparse.Namespace:
    return argparse.Namespace(output=str(place), compile=False, resume="auto", trials=1, seed=0, run=0, steps=4, lr=0.1)


def read_trials(place: Path) -> None:
    def again(_: argparse.Namespace) -> dict:
        raise InputError("the trial is run again")

    args = trial_options(place)
    trials.run_trials(args, "x", Devices(torch.device("cpu")), again, lambda entry: trials.said(entry["auroc"]))


def make_record(place: Path) -> None:
    made = prepared.Pairs(scale=2)
    (place / "subset0").mkdir()
    record = {"settings": prepared.settings_of(made), "pairs": 2, "seconds": 1.0, "rejected": 0}
    (place / "subset0" / "1.2.pairs.json").write_text(json.dumps(record))
    shutil.copy(__file__, place / "subset0" / "1.2_global_0.npy")


def read_record(place: Path) -> None:
    made = prepared.Pairs(scale=2)
    prepared.is_finished(prepared.Scan("1.2", 0, place / "1.2.mhd", place), made)
    prepared.refuse_other_settings(place, made)


# All -----------------------------------------------------------------------------------------------

GREY, COLOUR = noise(12, 10), noise(12, 10, 3)
READERS: list[Reader] = [
    pictures("png", damage.png, (GREY, {}), (COLOUR, {"dpi": (72, 72)}), (GREY.astype(np.uint16) * 256, {}),
             (noise(12, 10, 4), {})),
    pictures("jpg", damage.jpeg, (GREY, {}), (COLOUR, {"progressive": True})),
    pictures("tif", damage.tiff, (GREY, {}), (GREY.astype(np.uint16) * 99, {}), (GREY.astype(np.float32), {}),
             (COLOUR, {"compression": "tiff_lzw"}), (GREY, {"compression": "tiff_adobe_deflate"})),
    pictures("bmp", damage.head(70, "little"), (GREY, {}), (COLOUR, {})),
    pictures("gif", damage.head(60, "little"), (GREY, {})),
    pictures("ppm", damage.ppm, (COLOUR, {})),
    pictures("pgm", damage.ppm, (GREY, {})),
    *dicoms("", damage.dicom),
    *dicoms(" deflated", damage.deflated_dicom, deflate_dicom),
    *dicoms(" run lengths", damage.dicom, encapsulate_dicom("RLE")),
    *dicoms(" JPEG 2000", damage.dicom, encapsulate_dicom("JPEG2000")),
    Reader("DICOM series alike", make_series, lambda place: (make_alike(place), read_series(place)), damage.dicom,
           "0.dcm"),
    volumes("nii", NIFTI),
    volumes("nii.gz", damage.gzipped(NIFTI)),
    volumes("mhd", META, "*.mhd"),
    volumes("mha", META),
    volumes("mha compressed", META, compressed=True),
    volumes("nrrd", NRRD),
    volumes("nrrd compressed", NRRD, compressed=True),
    volumes("nhdr", NRRD, "*.nhdr"),
    Reader("npy cubes", make_cubes, read_cubes, damage.npy, "*.npy"),
    Reader("npz MedMNIST", make_medmnist("pneumoniamnist", (28, 28)), read_medmnist("pneumoniamnist"), NPZ),
    Reader("npz MedMNIST 3D", make_medmnist("nodulemnist3d", (28, 28, 28)), read_medmnist("nodulemnist3d"), NPZ),
    Reader("npz kept volume", make_kept, read_kept, NPZ, "kept.npz"),
    Reader("cache", make_cache, read_cache, damage.in_json, "index.json"),
    Reader("cache begun", make_begun, lambda place: caches.build(cached_images(place), place / "cache"), damage.in_json,
           "*.json*"),
    Reader("checkpoint", make_checkpoints, read_checkpoints, checkpoint_changes),
    Reader("checkpoint to resume", make_run, read_run, checkpoint_changes, "last.pt"),
    Reader("published models", make_prepared, read_prepared, checkpoint_changes),
    Reader("BYOL pickle", make_byol, read_byol, damage.opcodes),
    Reader("safetensors", make_safetensors, read_safetensors, damage.safetensors),
    Reader("lists", make_lists, read_lists, damage.table),
    Reader("tables", make_tables, read_tables, zipped_table),
    Reader("COCO", make_coco, read_coco, damage.in_json, "*.json"),
    Reader("study", make_study, read_study, damage.in_json, "*.json*"),
    Reader("trials", make_trials, read_trials, damage.in_json, "*.json"),
    Reader("records of cubes", make_record, read_record, damage.in_json, "*.json"),
]  # fmt: skip
