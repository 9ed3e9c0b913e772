"""Pickles of arrays of numbers, as JAX's libraries leave them: nothing that a file says is run, and no library builds
an array of bytes that were not checked."""

import io
import math
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medssl.errors import InputError, unusable

REFUSED = pickle.UnpicklingError


class StandIn:
    """What stands for a class of numpy, JAX or the interpreter while a file is read: made of plain values, and given a
    state only where it says so."""

    def __setstate__(self, state: object) -> None:
        raise REFUSED(f"refused: a state for {type(self).__name__.lower()}")


class Container(StandIn, dict):
    """Stands for a container class of JAX's libraries: keeps the mapping that it is made of, and does nothing else."""

    def __init__(self, *values: object) -> None:
        super().__init__(next((value for value in values if isinstance(value, Mapping)), {}))

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            inner = state.get("_mapping")
            self.update(inner if isinstance(inner, Mapping) else state)


class ByolState(StandIn, dict):
    """BYOL's experiment state, a named tuple, which pickles make by `__new__` alone."""

    def __new__(cls, *values: object) -> "ByolState":
        self = super().__new__(cls)
        self.update(zip(("online_params", "target_params", "online_state", "target_state", "opt_state"), values))
        return self

    def __init__(self, *values: object) -> None:
        """All is kept already."""


class Bytes(StandIn):
    """How pickles of protocol 2 write bytes: `_codecs.encode`, and `bytes` for none."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise REFUSED("refused: bytes in another encoding than latin1")
        return text.encode("latin1")


class Dtype(StandIn):
    """Stands for `numpy.dtype`: a kind of plain numbers, and their order of bytes."""

    def __init__(self, kind: object, align: object = False, copy: object = True) -> None:
        if type(kind) is not str or not re.fullmatch("b1|[iu][1248]|f[248]", kind):
            raise REFUSED(f"refused: an array of dtype {ascii(kind)[:40]}; only plain numbers are read")
        self.kind, self.order = kind, "="

    def __setstate__(self, state: object) -> None:
        plain = (None, None, None, -1, -1, 0)  # no fields, no sub-arrays, no flags
        if type(state) is not tuple or state[:1] not in ((3,), (4,)) or state[2:8] != plain:
            raise REFUSED("refused: a dtype's state that is not of plain numbers")
        if state[1] not in ("<", ">", "|", "=") or state[8:] not in ((), (None,), ({},)):
            raise REFUSED("refused: a dtype's state that is not of plain numbers")
        self.order = state[1]

    def made(self) -> np.dtype:
        return np.dtype(self.kind).newbyteorder(self.order)


class Array(StandIn, np.ndarray):
    """Stands for an array that numpy's `_reconstruct` makes empty, and its state fills, once."""

    filled = False

    def __new__(cls, *values: object) -> "Array":
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: object) -> None:
        if self.filled or type(state) is not tuple or len(state) != 5 or state[0] != 1:
            raise REFUSED("refused: an array's state that numpy does not write")
        _, shape, dtype, fortran, raw = state
        values = numbers(raw, dtype, shape, "F" if fortran is True else "C")
        np.ndarray.__setstate__(self, (1, values.shape, values.dtype, fortran is True, raw))
        self.filled = True


class Buffer(StandIn):
    """An array as pickles of protocol 5 write it: numpy's `_frombuffer`."""

    def __new__(cls, raw: object, dtype: object, shape: object, order: object, *more: object) -> np.ndarray:
        made = numbers(raw, dtype, shape, "F" if order == "F" else "C").view(Array)
        made.filled = True
        return made


class Scalar(StandIn):
    """A number of numpy's, `scalar`: becomes Python's."""

    def __new__(cls, dtype: object, raw: object) -> float:
        return numbers(raw, dtype, (), "C").item()


def numbers(raw: object, dtype: object, shape: object, order: str) -> np.ndarray:
    """An array of plain numbers from what a pickle says of it, on the bytes themselves; refused where they do not
    fit."""
    if type(dtype) is not Dtype or type(raw) not in (bytes, bytearray):
        raise REFUSED("refused: an array whose values are not the bytes of plain numbers")
    if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise REFUSED(f"refused: an array of shape {ascii(shape)[:40]}")
    made = dtype.made()
    if math.prod(shape) * made.itemsize != len(raw) or math.prod(max(n, 1) for n in shape) >= 2**48:
        raise REFUSED(f"refused: an array of shape {ascii(shape)[:40]} in {len(raw)} bytes")
    return np.frombuffer(raw, made).reshape(shape, order=order)


MULTIARRAY, NUMERIC = ("numpy.core.multiarray", "numpy._core.multiarray"), ("numpy.core.numeric", "numpy._core.numeric")
KEYS = (str, bytes, int, float, bool, type(None))  # of dictionaries: hashing tuples in tuples can end the process
# Opcodes that arrays and containers do not need: persistent names, extensions, other ways to make objects, buffers
# beside the file, and sets, which hash what is in them.
REFUSED_CODES = b"".join(
    (
        *(pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ),
        *(pickle.NEWOBJ_EX, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EMPTY_SET, pickle.ADDITEMS),
        pickle.FROZENSET,
    )
)


class PlainUnpickler(pickle._Unpickler):
    """Reads arrays of numbers and plain containers; anything else in the file is refused, so that nothing of it runs.

    It is Python's own: that in C lets a file say how much memory its memo takes.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REFUSED_CODES}
    KNOWN = {
        ("collections", "OrderedDict"): Container,
        **dict.fromkeys((("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes")), Bytes),
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        **{(module, "_reconstruct"): Array for module in MULTIARRAY},
        **{(module, "scalar"): Scalar for module in MULTIARRAY},
        **{(module, "_frombuffer"): Buffer for module in NUMERIC},
    }

    def find_class(self, module: str, name: str) -> type[StandIn]:
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        if name == "_ByolExperimentState":
            return ByolState
        if module.split(".")[0] in ("haiku", "byol", "jax", "optax", "jaxlib"):
            return Container
        raise REFUSED(f"refused: it wants {module}.{name}, which is neither an array nor a container")

    def load_call(self) -> None:
        """REDUCE and NEWOBJ: classes are stand-ins, and made alike by both."""
        made = self.stack[-2]
        if not (isinstance(made, type) and issubclass(made, StandIn) and type(self.stack[-1]) is tuple):
            raise REFUSED("refused: it calls what is no class of an array or a container")
        values = self.stack.pop()
        self.stack[-1] = made(*values)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], StandIn):
            raise REFUSED("refused: a state for what has none")
        self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_bytearray8(self) -> None:
        """As the interpreter's, which allocates before it reads."""
        (length,) = struct.unpack("<Q", self.read(8))
        raw = bytearray(self.read(length))
        if len(raw) != length:
            raise REFUSED("bytes end early")
        self.append(raw)

    def load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._set(pairs)

    def _set(self, pairs: list) -> None:
        if not isinstance(self.stack[-1], dict) or not all(type(key) in KEYS for key in pairs[::2]):
            raise REFUSED("refused: a dictionary whose keys are neither text nor numbers")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    dispatch.update(
        {
            **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), load_call),
            **{pickle.BUILD[0]: load_build, pickle.DICT[0]: load_dict, pickle.BYTEARRAY8[0]: load_bytearray8},
            **{pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems},
        }
    )


def read_pickle(path: Path) -> object:
    """Read a pickle of arrays; an InputError for one that wants more, and for other files."""
    with unusable(path, "not a pickle of arrays, or a truncated one"):
        try:
            return PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        except pickle.UnpicklingError as error:
            if str(error).startswith("refused"):
                raise InputError(f"{path}: {' '.join(str(error).split())}") from None
            raise
