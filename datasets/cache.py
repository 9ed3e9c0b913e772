"""Decoded and resized images in one memory-mapped file, so that training decodes nothing.

A cache is a folder with

* `images.u8`: (N, C, S, S) uint8, textures as `ImageDataset` gives them, zeros for a bad file;
* `index.json`: set, S, C, ids, fingerprints, original sizes, the bad files with their reasons, and whether it is
  finished;
* `progress.jsonl`: while it is being made, one line for every finished block.

A fingerprint is an image's size in bytes and a digest of all of them, those of the file, or of the array where there
is no file. It does not change when files are copied. Training compares the size of every image, and the digest of
`SAMPLED`; making or finishing a cache compares all, which reads every file.

Volumes of files are kept in such a folder too, as they are first read: one `.npz` for each, with the arrays of its
item. Its name is a digest of the files' paths, sizes and times, and of how they were read.
"""

import contextlib
import copy
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from medssl import processes
from medssl.datasets.base import ImageDataset
from medssl.datasets.identity import files_in
from medssl.errors import LACKS, InputError, UnreadableImage, unreadable, unusable
from medssl.files import append_text, digest, naming, write_atomic, write_text
from medssl.locks import LOCK, lock_folder
from medssl.reading.arrays import read_npz
from medssl.reading.simpleitk import use_one_thread

VERSION = 3  # 1 had no fingerprints, 2 textures made by the box filter alone
KEYS = {"version", "finished", "set", "size", "channels", "block", "ids"}  # of every index
NO_INDEX = "not the index of a cache; choose another folder"
SAMPLED = 64  # images of a split whose digests training compares: whole sets of the same names and sizes differ there
BLOCK_BYTES = 2**24  # decoded between two notes of progress: what a killed build loses, per process


def union(parts: Sequence[ImageDataset]) -> ImageDataset:
    """All images of several splits of a set, unlabelled, as one data set.

    Raises:
        InputError: when two splits share an id.
    """
    ids = [name for part in parts for name in part.ids]
    if len(set(ids)) < len(ids):
        raise InputError(f"data set {parts[0].info.name}: two splits share images, so a cache cannot name them")
    return ImageDataset(parts[0].info, _Concatenated(parts), ids, texture_size=parts[0].texture_size)


class _Concatenated:
    """The source of `union`."""

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def find(self, index: int) -> tuple[ImageDataset, int]:
        """The split that has image `index`, and its number there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        part = self.parts[number]
        return part, index - int(self.ends[number]) + len(part)

    def __call__(self, index: int) -> np.ndarray:
        part, i = self.find(index)
        return part.read(part.positions[i])

    def fingerprint(self, index: int, content: bool = True) -> str:
        return fingerprint(*self.find(index), content)


def fingerprint(data: ImageDataset, i: int, content: bool = True) -> str:
    """What tells whether image i is the one that was cached: "bytes:digest", or "bytes" without its content."""
    source, position = data.read, data.positions[i]
    if hasattr(source, "fingerprint"):
        return source.fingerprint(position, content)
    try:
        pixels = source(position)
    except UnreadableImage:
        return "unreadable"
    return f"{pixels.nbytes}:{digest(pixels.tobytes())}" if content else str(pixels.nbytes)


def changed(data: ImageDataset, rows: Iterable[tuple[int, str]], content: bool = True) -> Iterator[int]:
    """The images that differ from the fingerprints beside their numbers."""
    for i, cached in rows:
        if fingerprint(data, i, content) != (cached if content else cached.partition(":")[0]):
            yield i


class _Blocks(torch.utils.data.Dataset):
    """Item b decodes block b of a data set and writes it into the file, in the process that asks for it.

    So no pixels pass between processes; a DataLoader of these is a pool of writers of separate places.
    """

    def __init__(self, data: ImageDataset, file: Path, block: int) -> None:
        self.data, self.file, self.block = data, file, block

    def __len__(self) -> int:
        return -(-len(self.data) // self.block)

    def __getitem__(self, number: int) -> dict:
        """Write one block; returns its number, fingerprints, sizes, and the bad files' rows and reasons."""
        data, first = self.data, number * self.block
        rows = _block_rows(data, self.block, number)
        channels, side = data.info.channels, data.texture_size
        textures = np.zeros((len(rows), channels, side, side), np.uint8)
        # Before decoding, so that a file that changes meanwhile does not pass for what was decoded.
        prints = [fingerprint(data, row) for row in rows]
        sizes, bad = [], {}
        for texture, row in zip(textures, rows):
            try:
                item = data.load(row)
            except UnreadableImage as error:
                sizes.append([0, 0])
                bad[str(row)] = str(error)
                continue
            texture[:] = item["image"].numpy()
            sizes.append(item["size"].int().tolist())
        with naming(self.file), open(self.file, "r+b") as file:
            file.seek(first * channels * side * side)
            file.write(textures.tobytes())
            file.flush()
            os.fsync(file.fileno())  # the note of progress, written next, must not be older than the pixels
        return {"block": number, "fingerprints": prints, "sizes": sizes, "bad": bad}


def build(data: ImageDataset, folder: str | Path, workers: int = 0, limit: float = 0) -> dict:
    """Make a cache of all images of a 2D data set, or finish one that was interrupted.

    Args:
        data: what to decode. The result depends on it alone, not on `workers` or on interruptions.
        folder: where the cache goes.
        workers: decoding processes; 0 decodes in this one. limit: seconds to wait for a block; 0: for ever.

    Returns:
        the index, as `index.json` has it.

    Raises:
        InputError: when the folder holds a cache of something else or of files that have changed, another process
            is making it, the set is not 2D, or the disk is full.
    """
    if data.info.dims != 2:
        later = "; training keeps them in --cache as it reads them" if isinstance(data, DecodedVolumes) else ""
        raise InputError(
            f"data set {data.info.name}: only 2D images are cached, these have {data.info.dims} dimensions{later}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _build(data, folder, workers, limit)


def _build(data: ImageDataset, folder: Path, workers: int, limit: float) -> dict:
    """`build` in a folder that no other process touches."""
    shape = (len(data), data.info.channels, data.texture_size, data.texture_size)
    block = max(1, BLOCK_BYTES // int(np.prod(shape[1:])))
    index = {
        **{"version": VERSION, "finished": False, "set": data.info.name, "size": shape[2], "channels": shape[1]},
        **{"block": block, "ids": data.ids},
    }
    present = _read_index(folder)
    if present is None:
        _start(folder, shape, index)
    else:
        if present["version"] != VERSION:
            raise InputError(f"{folder}: a cache by another version; remove it and run this again")
        for key in ("set", "size", "channels", "ids"):
            if present[key] != index[key]:
                raise InputError(f"{folder}: holds a cache of other images ({key} differs); choose another --output")
        if present["finished"]:
            _refuse_changed(data, folder, list(enumerate(present["fingerprints"])), workers)
            return present
        index["block"] = block = present["block"]
    blocks = _Blocks(data, folder / "images.u8", block)
    done = _read_progress(folder / "progress.jsonl", data, block)
    known = [pair for b, note in done.items() for pair in zip(_block_rows(data, block, b), note["fingerprints"])]
    _refuse_changed(data, folder, known, workers)
    missing = [number for number in range(len(blocks)) if number not in done]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(blocks, missing),
        batch_size=None,
        num_workers=min(workers, len(missing)),
        collate_fn=_as_is,
        worker_init_fn=processes.begin,
    )
    with (
        tqdm(
            total=len(data), initial=len(data) - sum(len(_block_rows(data, block, b)) for b in missing),
            desc=f"cache {data.info.name}", disable=None,
        ) as bar,
        processes.iterating(loader, limit) as notes,
    ):  # fmt: skip
        for note in notes:
            done[note["block"]] = note
            append_text(folder / "progress.jsonl", json.dumps(note) + "\n")
            bar.update(len(note["sizes"]))
    for key in ("fingerprints", "sizes"):
        index[key] = [value for number in range(len(blocks)) for value in done[number][key]]
    index["bad"] = {row: why for number in range(len(blocks)) for row, why in done[number]["bad"].items()}
    index["finished"] = True
    write_text(folder / "index.json", json.dumps(index))
    (folder / "progress.jsonl").unlink()
    return index


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other builds out of a folder until this one ends, however it ends."""
    lock = lock_folder(folder, wait=0)
    if lock is None:
        raise InputError(f"{folder}: another process is making this cache; wait for it")
    with lock:
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # a cache has no other files than its own


def _refuse_changed(data: ImageDataset, folder: Path, cached: list[tuple[int, str]], workers: int) -> None:
    """Raise InputError where an image differs from the fingerprint beside its number."""
    parts = np.array_split(np.arange(len(cached)), max(1, min(len(cached), 64 * max(1, workers))))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(lambda part: list(changed(data, (cached[i] for i in part))), parts)
        wrong = [i for some in found for i in some]
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} images changed after they were cached, such as {data.ids[wrong[0]]}; remove the "
            "folder and run this again, or choose another --output"
        )


def _block_rows(data: ImageDataset, block: int, number: int) -> range:
    return range(number * block, min((number + 1) * block, len(data)))


def _as_is(note: dict) -> dict:
    return note  # the default would make tensors of the numbers


def _start(folder: Path, shape: tuple[int, ...], index: dict) -> None:
    """Lay out an empty cache."""
    needed, free = int(np.prod(shape, dtype=np.int64)), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: the cache needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    (folder / "progress.jsonl").unlink(missing_ok=True)
    with naming(folder / "images.u8"), open(folder / "images.u8", "wb") as file:
        file.truncate(needed)
    write_text(folder / "index.json", json.dumps(index))  # last: a folder with an index has the rest


def _read_index(folder: Path) -> dict | None:
    path = folder / "index.json"
    if not path.is_file():
        return None
    with unusable(path, NO_INDEX):
        index = json.loads(path.read_text(encoding="utf-8"))
        if not index.keys() >= KEYS or (index["version"] == VERSION and not _is_whole(index)):
            raise InputError(f"{path}: {NO_INDEX}")
    return index


def _is_whole(index: dict) -> bool:
    """Whether an index is as `_build` writes it."""
    count, whole = len(index["ids"]), all(isinstance(name, str) for name in index["ids"])
    whole = whole and all(type(index[key]) is int and index[key] > 0 for key in ("size", "channels", "block"))
    return whole and (not index["finished"] or _tells(index, count, range(count)))


def _tells(note: dict, count: int, rows: range) -> bool:
    """Whether an index, or a note of progress, tells of `count` images, the bad ones of them in `rows`."""
    prints, sizes, bad = note["fingerprints"], note["sizes"], note["bad"]
    whole = len(prints) == len(sizes) == count and all(isinstance(one, str) for one in [*prints, *bad.values()])
    numbers = np.array(sizes)  # of a text among them, texts are made of all
    whole = whole and numbers.dtype.kind in "iuf" and numbers.shape == (count, 2)
    return whole and all(int(row) in rows for row in bad)


def _read_progress(path: Path, data: ImageDataset, block: int) -> dict[int, dict]:
    """Finished blocks by number. A last line that a kill has cut, as any damaged one, is dropped from the file too."""
    notes = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(UnreadableImage), unreadable():
                note = json.loads(line)
                rows = _block_rows(data, block, note["block"])
                if note["block"] >= 0 and len(rows) and _tells(note, len(rows), rows):
                    notes[note["block"]] = note
        write_text(path, "".join(json.dumps(note) + "\n" for note in notes.values()))
    return notes


class _Rows:
    """Rows of a finished cache; the file is mapped by each process when it first reads."""

    def __init__(self, folder: Path, index: dict) -> None:
        self.file = folder / "images.u8"
        self.shape = (len(index["ids"]), index["channels"], index["size"], index["size"])
        self.sizes = torch.tensor(index["sizes"], dtype=torch.float32)  # (N, 2) height and width
        self.bad = {int(row): reason for row, reason in index["bad"].items()}
        self._images: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_images": None}  # pickling a mapped array would copy all of it

    def texture(self, row: int) -> np.ndarray:
        """(C, S, S) uint8, a copy of its own.

        Raises:
            UnreadableImage: where the file could not be decoded when the cache was made.
        """
        if row in self.bad:
            raise UnreadableImage(self.bad[row])
        if self._images is None:
            self._images = np.memmap(self.file, np.uint8, "r", shape=self.shape)
        return np.array(self._images[row])


class Cached:
    """Items of a data set by the positions of its images, read from a cache.

    Args:
        row_of: the cache's row of each position.
    """

    def __init__(self, rows: _Rows, row_of: dict[int, int]) -> None:
        self.rows, self.row_of = rows, row_of

    def __call__(self, position: int) -> dict[str, torch.Tensor]:
        row = self.row_of[position]
        return {"image": torch.from_numpy(self.rows.texture(row)), "size": self.rows.sizes[row].clone()}


class DecodedVolumes(ImageDataset):
    """Volumes decoded from files: what `read` gives is a path, or holds paths.

    A subclass has `decode`, and in `recipe` all but the files that its result depends on.

    Attributes:
        kept_in: folder where items are kept from the first reading on, or None.
    """

    kept_in: Path | None = None

    @property
    def recipe(self) -> tuple:
        """Numbers, strings and tuples of them."""
        raise NotImplementedError

    def decode(self, source: object) -> dict[str, torch.Tensor]:
        """The item of what `read` gives, without its label; an UnreadableImage for a file that cannot be decoded."""
        raise NotImplementedError

    def load(self, i: int) -> dict[str, torch.Tensor]:
        """Volume i without its label, kept where `kept_in` says.

        Raises:
            UnreadableImage: for a file that cannot be decoded.
            InputError: when an item cannot be kept, as on a full disk.
        """
        if torch.utils.data.get_worker_info():
            use_one_thread()
        source = self.read(self.positions[i])
        name = None if self.kept_in is None else self._name(source)
        if name is None:
            return self.decode(source)
        path = self.kept_in / name
        # A file that cannot be read, such as one cut by a power failure, is made anew.
        with contextlib.suppress(UnreadableImage), unreadable():
            item = {key: torch.from_numpy(array) for key, array in read_npz(path).items()}
            if item["image"].ndim == 4 and item["size"].shape == (3,):
                return item
        item = self.decode(source)
        try:
            arrays = {key: tensor.numpy() for key, tensor in item.items()}
            write_atomic(path, lambda unfinished: np.savez(unfinished, **arrays))
        except OSError as error:
            if error.errno in LACKS:  # not the folder's fault
                raise
            raise InputError(f"--cache {self.kept_in}: {error.strerror}; leave it out, or choose another") from None
        return item

    def _name(self, source: object) -> str | None:
        """A file name that changes with the files, and with how they are read; None where a file is missing."""
        try:
            states = [
                (os.fspath(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files_in(source)
            ]
        except OSError:
            return None  # decoding says which
        return f"{digest(json.dumps([VERSION, type(self).__name__, self.recipe, states]).encode())}.npz"


def attach(data: ImageDataset, folder: str | Path, root: str | None = "DIR") -> ImageDataset:
    """The same images, labels and patients, read from a cache; volumes of files fill theirs as they are read.

    `root`, their folder, is for messages.

    Raises:
        InputError: when the cache is missing, unfinished, of other images or of files that have changed, or of
            another texture size or number of channels; the text has the command that makes the right one. For
            volumes that are read as fast without: cubes, and what is in memory.
    """
    info, folder = data.info, Path(folder)
    if isinstance(data, DecodedVolumes):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            if error.errno in LACKS:
                raise
            raise InputError(f"--cache {folder}: {error.strerror}; leave it out, or choose another") from None
        data = copy.copy(data)
        data.kept_in = folder
        return data
    if info.dims != 2:
        raise InputError(
            f"--cache {folder}: only 2D images are cached, and volumes that training decodes; those of {info.name} "
            "are read as fast without it; leave it out"
        )
    index = _read_index(folder)
    where = f" --data {shlex.quote(str(root))}" if root else ""
    command = (
        f"run: python preprocess/cache_images.py --dataset {info.name}{where} "
        f"--texture-size {data.texture_size} --output {folder}"
    )
    if index is None:
        raise InputError(f"--cache {folder}: no cache there; {command}")
    if index["version"] != VERSION:
        raise InputError(f"--cache {folder}: made by another version; remove it and {command}")
    if not index["finished"]:
        raise InputError(f"--cache {folder}: the cache is not finished; {command}")
    for key, wanted in (("set", info.name), ("size", data.texture_size), ("channels", info.channels)):
        if index[key] != wanted:
            what = {"set": "data set", "size": "texture size"}.get(key, key)
            raise InputError(f"--cache {folder}: its {what} is {index[key]}, not {wanted}; {command}-{wanted}")
    size = int(np.prod([len(index["ids"]), index["channels"], index["size"], index["size"]], dtype=np.int64))
    if not (folder / "images.u8").is_file() or (folder / "images.u8").stat().st_size != size:
        raise InputError(
            f"--cache {folder}: images.u8 is not of the size of its index; remove the folder and {command}"
        )
    row_of = {name: row for row, name in enumerate(index["ids"])}
    missing = [name for name in data.ids if name not in row_of]
    if missing:
        raise InputError(
            f"--cache {folder}: {len(missing)} of {len(data)} images are not in it, such as {missing[0]}; "
            f"{command}-new without --list"
        )
    rows = [row_of[name] for name in data.ids]
    cached = [(i, index["fingerprints"][row]) for i, row in enumerate(rows)]
    some = [cached[i] for i in np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int))]
    wrong = next(changed(data, cached, content=False), None)
    wrong = next(changed(data, some), None) if wrong is None else wrong
    if wrong is not None:
        raise InputError(
            f"--cache {folder}: {data.ids[wrong]} is not the image that was cached: it has changed, or --data is "
            f"another set with the same names; remove the folder and {command}"
        )
    data = copy.copy(data)
    data.cached = Cached(_Rows(folder, index), dict(zip(data.positions, rows)))
    return data
