"""Generated sets are made once a machine: kept in the user's cache folder, and shared by processes.

They lie in `~/.cache/medssl/generated` (`$XDG_CACHE_HOME/medssl/generated` where that is set), a folder for each set,
split, series, size and version of its generator and of the libraries that it draws with. Any of them may be deleted:
it is made again.
"""

import contextlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np

from medssl.errors import InputError, UnreadableImage
from medssl.files import digest, read_json, write_atomic, write_folder, write_json
from medssl.locks import lock_folder, say_waiting
from medssl.reading.arrays import read_npy

FEW = 64  # single images that are remembered: more than the contents of a split are known by

LIBRARIES = ("numpy", "pillow", "scipy", "torch")  # that generators draw with: another version may draw otherwise

SOON, LONGEST = 1.0, 600.0  # seconds that another process's making is waited for, without a word and with one

SERIES = 1000  # from a split's seed in one series to that in the next

SHAPES = "arrays.json"  # beside the arrays: which there are

Arrays = dict[str, np.ndarray]


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again; of a user without a home, a temporary folder."""
    known = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"), tempfile.gettempdir()]
    return Path(next(filter(os.path.isabs, known)), "medssl", "generated")


def seed_of(split: str, seeds: Mapping[str, int], series: int) -> int:
    """The seed of a split, of which `seeds` has that of series 0.

    Raises:
        InputError: for a split that the set does not have.
    """
    if split not in seeds:
        raise InputError(f"generated sets have the splits {', '.join(seeds)}, not {split}")
    return seeds[split] + SERIES * series


@cache
def version_of(module: ModuleType) -> str:
    """The version of a generator: a digest of its text and of the libraries that it draws with."""
    return digest("\n".join([inspect.getsource(module), *map(version, LIBRARIES)]).encode())


class Generated:
    """The arrays of a generated split. Nothing is made before it is asked for.

    Args:
        module: of the generator, whose text is its version with those of LIBRARIES.
        name: of the set, the split, and all that its images depend on besides.
        count: number N of images.
        make: from numbers of images to their arrays by name, (len, …) each.
    """

    def __init__(self, module: ModuleType, name: str, count: int, make: Callable[[Sequence[int]], Arrays]) -> None:
        self.name, self.count, self.make = name, count, make
        self.folder = cache_folder() / f"{name}-{version_of(module)}"
        self.few: dict[int, Arrays] = {}

    def row(self, key: str, i: int) -> np.ndarray:
        """The array `key` of image i, a copy. Where the others are not there yet, it is made alone: to know a set, a
        few of its images suffice."""
        if "arrays" in self.__dict__ or os.path.isdir(self.folder / "arrays"):  # False, too, where one may not look
            return np.array(self.arrays[key][i])
        if i not in self.few:
            if len(self.few) == FEW:
                return np.array(self.arrays[key][i])
            self.few[i] = {name: array[0] for name, array in self.make([i]).items()}
        return np.array(self.few[i][key])

    def prepare(self) -> None:
        """Have all images made, as training does."""
        _ = self.arrays

    @cached_property
    def arrays(self) -> Arrays:
        """All images: from the cache folder, which is filled when it lacks them; in memory where it cannot be."""
        made = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock() as lock:
                found = self._stored()
                if found is None and lock is not None:
                    made = self.make(range(self.count))
                    write_folder(self.folder / "arrays", partial(write_arrays, made))
                    found = self._stored()
            if found is not None:
                return found
            reason = "another process still makes them" if lock is None else "what was written there cannot be read"
        except OSError as error:
            reason = error.strerror or str(error)
        print(f"note: {self.folder}: {reason}; generated images are not kept", file=sys.stderr)
        return self.make(range(self.count)) if made is None else made

    def _lock(self) -> contextlib.AbstractContextManager:
        """The folder's lock, for which a process that is making the images is waited; None where it does not end."""
        lock = lock_folder(self.folder, SOON)
        if lock is None:
            say_waiting(self.folder, "generated images in", LONGEST)
            lock = lock_folder(self.folder, LONGEST)
        return contextlib.nullcontext() if lock is None else lock

    def _stored(self) -> Arrays | None:
        """What the cache folder has, mapped into memory; None where it is not there, or damaged."""
        folder = self.folder / "arrays"
        try:
            shapes = read_json(folder / SHAPES)
            found = {name: read_npy(folder / f"{name}.npy", mapped=True) for name in shapes}
            return found if found and shapes == shapes_of(found) else None
        except (InputError, UnreadableImage):
            return None

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "arrays"}  # mapped anew, not copied


def shapes_of(arrays: Arrays) -> dict[str, list]:
    """Shape and kind of number of each array, as JSON has them."""
    return {name: [list(array.shape), array.dtype.str] for name, array in arrays.items()}


def write_arrays(arrays: Arrays, folder: Path) -> None:
    """Write each array to a file of its name, and what they all are."""
    for name, array in arrays.items():
        write_atomic(folder / f"{name}.npy", partial(np.save, arr=array))
    write_json(folder / SHAPES, shapes_of(arrays))
