"""What is in a folder: images, volumes, and series of slices."""

import os
from pathlib import Path
from typing import BinaryIO

from medssl.errors import InputError

DICOM_EXTENSIONS = (".dcm", ".dicom", ".dic", ".ima")
IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", *DICOM_EXTENSIONS),
)


def find_images(folder: str | Path) -> list[Path]:
    """Image files below a folder, sorted by path.

    Files count by extension, and by the DICOM magic where there is no extension (or only the last number of
    a UID). Hidden files and `__MACOSX` are skipped. Links to folders are followed, each folder once.

    Raises:
        InputError: when `folder` is not a folder.
    """
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: not a folder")
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        current = waiting.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back to where we have been
        seen.add((status.st_dev, status.st_ino))
        folders = []
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                # A broken link is listed, so that reading it is what reports it.
                elif (entry.is_file() or entry.is_symlink()) and _looks_like_image(entry.path):
                    found.append(entry.path)
        waiting += sorted(folders, reverse=True)  # sorted: which of two links to a folder wins is fixed
    return sorted(map(Path, found), key=Path.as_posix)


def _looks_like_image(path: str) -> bool:
    extension = os.path.splitext(path)[1].lower()
    if extension and not extension[1:].isdigit():
        return extension in IMAGE_EXTENSIONS
    try:
        with open(path, "rb") as file:
            return has_dicom_magic(file)
    except OSError:
        return False


VOLUME_EXTENSIONS = (".nii.gz", ".nii", ".mhd", ".mha", ".nrrd", ".nhdr")


def find_volumes(folder: str | Path) -> list[tuple[str, Path]]:
    """Volumes in a folder and below it: files by extension, and folders that hold a DICOM series.

    Hidden files and `__MACOSX` are skipped; links to folders are followed, each folder once. A single file is found
    too, when its own path is given.

    Returns:
        (id, path), sorted by id. The id is the path relative to `folder` with forward slashes and without the
        extension, which stays where two volumes would share an id.

    Raises:
        InputError: when there is no such folder.
    """
    folder = Path(folder)
    if folder.is_file() and folder.name.lower().endswith(VOLUME_EXTENSIONS):
        return [(without_extension(folder.name), folder)]
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder")
    paths: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()  # a link back to where we have been
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if _shown(name))
        files = sorted(filter(_shown, files))
        paths += [Path(current, name) for name in files if name.lower().endswith(VOLUME_EXTENSIONS)]
        dicom = (name for name in files if _looks_like_dicom(Path(current, name)))
        if next(dicom, None) and next(dicom, None):  # one alone is a radiograph
            paths.append(Path(current))
    names = {path: path.relative_to(folder).as_posix() if path != folder else folder.resolve().name for path in paths}
    short = {path: without_extension(name) for path, name in names.items()}
    taken = list(short.values())
    return sorted((short[path] if taken.count(short[path]) == 1 else names[path], path) for path in paths)


def without_extension(name: str) -> str:
    """A file's name without the extension of a volume; folders may have dots."""
    return next((name[: -len(end)] for end in VOLUME_EXTENSIONS if name.lower().endswith(end)), name)


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _looks_like_dicom(path: Path) -> bool:
    extension = path.suffix.lower()
    if extension and not extension[1:].isdigit():  # the last number of a UID is no extension
        return extension in DICOM_EXTENSIONS
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def has_dicom_magic(file: BinaryIO) -> bool:
    head = file.read(132)
    file.seek(0)
    return head[128:] == b"DICM"


def is_dicom(file: BinaryIO, path: str | Path) -> bool:
    # Old DICOM files lack the magic; for those the extension speaks.
    return has_dicom_magic(file) or os.fspath(path).lower().endswith(DICOM_EXTENSIONS)
