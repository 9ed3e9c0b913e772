"""Files of tensors: written atomically, read without ever executing what they hold."""

import argparse
import contextlib
import errno
import json
import mmap
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from torch import Tensor

from medssl.engine.opcodes import TOO_DEEP, end_of_pickle
from medssl.engine.plain_pickle import STAND_INS
from medssl.errors import InputError, lacks, wanted
from medssl.files import file_digest, split_init, write_atomic

FORMAT_VERSION = 2  # of what runs leave

# Classes and functions that files of weights name.
WEIGHTS_HAVE = re.compile(
    r"torch\.(\w+Storage|Size|device|Tensor|bool|(b?float|u?int|complex)\d+|(_utils|_tensor)\._rebuild_\w+|storage\.\w+)"
    r"|torch\.nn\.parameter\.Parameter|collections\.OrderedDict|argparse\.Namespace|_codecs\.encode"
)
LEGACY_PICKLES = 5  # in a file as torch wrote it before 1.6: three of its own, the content, the storages' names
SAVE_ANEW = "where it was made, save them anew: torch.save(model.state_dict(), FILE)"

# Encoders whose names begin so ended before their network's last ReLU in files of version 1.
WITHOUT_LAST_RELU = ("densenet", "xception")


def lacks_last_relu(version: object, arch: str) -> bool:
    """Whether what a run of a version left is of an encoder without its network's last ReLU; of no version, which files
    of others have: no."""
    return isinstance(version, int) and version < 2 and arch.startswith(WITHOUT_LAST_RELU)


def save_atomic(content: object, path: str | Path) -> None:
    """Write `content` with torch.save so that `path` always holds a complete file, old or new.

    The data reach the disk before the rename; a kill or a full disk leaves the previous file in place.
    """

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:  # torch's own file would not tell why it cannot be written
            torch.save(content, file)

    write_atomic(path, write)


def weights_digest(init: str | Path) -> str:
    """SHA-256 of a checkpoint, hexadecimal; an InputError when it is not there. Of `FILE:PREFIX`, the file's."""
    path, _ = split_init(init)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    return file_digest(path)


def load_safe(path: str | Path, device: str | torch.device = "cpu") -> object:
    """Read a file of torch.save or of safetensors: tensors, plain values, and argparse.Namespace (published files).

    What is harmless beside (numpy's arrays, paths, configurations) is read as `plain_pickle`'s stand-ins. A safetensors
    file's entries are under "state_dict", and its metadata beside them.

    Raises:
        InputError: when the file is missing, truncated, no checkpoint, or asks for any other class, which
            would mean running code from it.
        MemoryError, RuntimeError, OSError: as `errors.explain` knows them, when the machine lacks what the file needs.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        return without_attributes(_read_safetensors(path, device) if start[8:] == b"{" else _read_pickle(path, device))
    except Exception as error:  # whatever the readers end in: they are others', and the file may be anything
        if _not_the_files(error, path):
            raise
        raise InputError(f"{path}: {_what_is_wrong(str(error), path)}") from None


def without_attributes(content: object) -> object:
    """What a file holds, less the attributes that it gave to its dictionaries and tensors, which would stand before
    their methods (`items`, `get`, `is_floating_point`). Dictionaries keep `_metadata`, if it is one too."""
    seen, left = set(), [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            vars(value).clear()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:  # it may hold itself
            seen.add(id(value))
            inner = value
            if isinstance(value, dict):
                inner = [*dict.values(value)]
                if type(value) is not dict:
                    beside = vars(value).get("_metadata")
                    vars(value).clear()
                    if isinstance(beside, dict):
                        value._metadata = beside
                        inner.append(beside)
            left.extend(inner)
    return content


def _not_the_files(error: Exception, path: Path) -> bool:
    """Whether an error of a reader tells nothing of its file: what the machine lacks for what the file holds, though
    not for what one claims; no permission; a disk that fails, which is then told with the file's name."""
    if lacks(error):
        size, asked = path.stat().st_size, wanted(error)
        if isinstance(error, torch.OutOfMemoryError):  # comes when the file was read, and of rounded pieces
            return True
        if asked is None and isinstance(error, MemoryError):  # as Python's do not say how much
            return not _is_room(size)
        return asked is None or asked <= size
    if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):  # of files that are cut very short
        return False
    error.filename = error.filename or str(path)
    return True


def _is_room(size: int) -> bool:
    """Whether there is memory for whatever a file of a size holds, as small objects perhaps."""
    try:
        bytearray(32 * size + 2**24)
    except MemoryError:
        return False
    return True


def _read_pickle(path: Path, device: str | torch.device) -> object:
    check_tuples(path)
    known = [argparse.Namespace, *((stand_in, name) for name, stand_in in STAND_INS.items())]
    with warnings.catch_warnings(), torch.serialization.safe_globals(known):
        warnings.simplefilter("ignore")  # of formats that are refused in one line
        return torch.load(path, map_location=device, weights_only=True)


def check_tuples(path: Path) -> None:
    """Raise pickle.UnpicklingError for a file of torch.save whose tuples lie deeper in one another than `opcodes`
    bears: a reader that hashes them would end the process. Files of other formats raise anything."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":  # by which torch tells its archives
            file.seek(0)
            reader = torch._C.PyTorchFileReader(file)  # torch's own: of two entries of a name, zipfile takes the other
            if not reader.has_record("constants.pkl"):  # a program's, which is refused
                end_of_pickle(reader.get_record("data.pkl"))
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = 0
            for _ in range(LEGACY_PICKLES):
                at = end_of_pickle(data, at)


def _read_safetensors(path: Path, device: str | torch.device) -> dict:
    with safe_open(path, "pt", device=str(device)) as file:
        facts = {name: _value(text) for name, text in (file.metadata() or {}).items()}
        return {**facts, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118, no mapping


def _value(text: str) -> object:
    """What JSON says, which our own metadata are; other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _what_is_wrong(reason: str, path: Path) -> str:
    """A reader's words → what to say of the file."""
    if reason == TOO_DEEP:
        return f"refused, it holds {reason}, which no weights need; {SAVE_ANEW}"
    found = re.search(r"GLOBAL ([\w.]{1,200}) w(?:as|hose)", reason)
    other = re.search(r"Unsupported operand 1(4\d|5[0-2])\b", reason)  # of protocol 4 or 5
    name = found[1] if found else _foreign_name(path) if other else None
    if name:
        return f"refused, the file wants to run code on loading: it holds {name}, and not weights alone; {SAVE_ANEW}"
    if re.search("GLOBAL|Unsupported class|Trying to call|Can only (?:create|build)", reason):
        return "refused, the file wants to run code on loading"
    if "TorchScript" in reason:
        return "a TorchScript program; save its weights anew: torch.save(torch.jit.load(FILE).state_dict(), NEW)"
    if other:
        return "a pickle of another protocol than torch.save's; save it anew: torch.save(model.state_dict(), FILE)"
    return "not a checkpoint, or a truncated one"


def _foreign_name(path: Path) -> str | None:
    """The first class or function that is named by a pickle of protocol 4 or 5, in a file or in torch's archive of it,
    and that files of weights have not. Nothing of the file is run."""
    with contextlib.suppress(Exception), _pickle_in(path) as file:  # where it is damaged, what is before that counts
        for _ in range(LEGACY_PICKLES):
            for name in _names_in(file):
                if name is None:
                    return "what it does not spell out"
                if name not in STAND_INS and not WEIGHTS_HAVE.fullmatch(name):
                    return re.sub(r"[^\w.]", "?", name[:200])
    return None


def _names_in(file: IO[bytes]) -> Iterator[str | None]:
    """What a pickle of protocol 4 or 5 names, as "module.name"; None for a name that is not two texts in a row."""
    texts: list[str | None] = []  # what is put on the stack, None for what is no text
    memo: dict[int, str | None] = {}
    for operation, value, _ in pickletools.genops(file):
        if operation.name == "STACK_GLOBAL":
            yield None if None in texts[-2:] else ".".join(map(str, texts[-2:]))
        if operation.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else None
        elif operation.name != "FRAME":
            is_text = isinstance(value, str) and "UNICODE" in operation.name
            texts.append(value if is_text else memo.get(value) if operation.name.endswith("GET") else None)


def _pickle_in(path: Path) -> IO[bytes]:
    if not zipfile.is_zipfile(path):
        return open(path, "rb")
    archive = zipfile.ZipFile(path)
    return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
