"""Where in a checkpoint of anyone's the entries of a network are: by their names' ends and their shapes, whatever
dictionaries and prefixes they lie in."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from medssl.errors import InputError

CONTAINERS = (Mapping, list, tuple)  # that are looked into
DEEPEST = 16  # levels of dictionaries that are looked into
SHARE = 0.95  # of a network's entries that a place must have, to be one of it
FIRST = ("state_dict", "model", "encoder")  # of dictionaries that nothing else tells apart
DECODER = "decoder_state_dict"  # where our files and PCRL's have what is no encoder
# Parts of names. What a paper judges: the teacher of teacher and student, an average of weights; not the momentum twin
# of a contrast, which only makes keys or targets.
TEACHERS = {"teacher"}
AVERAGES = {"ema", "swa", "average", "averaged", "avg"}
TWINS = {"k", "key", "momentum", "target"}
# Parts that say that entries are no weights, though they have their names and shapes: an optimiser's, gradients.
NO_WEIGHTS = re.compile(r"(?i)(optimi[sz]ers?|optim|opt)(_states?)?|grads?|gradients?|exp_avg(_sq)?|momentum_buffers?")
# What wrappers put before a module's names, anywhere in them: torch.compile, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\.")
CONTRASTS = {"contrast", "queue"}  # what files hold whose momentum twin makes keys


def shown(name: str) -> str:
    """A name from a file as a line can hold it."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:200])


@dataclass(frozen=True)
class Table:
    """A dictionary's tensors.

    Attributes:
        path: the keys that lead to it. entries: its tensors by name.
    """

    path: tuple[str, ...]
    entries: dict[str, Tensor]


def tables_of(content: object, path: str | Path) -> list[Table]:
    """Every dictionary in a checkpoint that holds named tensors, outer ones first, otherwise in the file's order.

    Raises:
        InputError: where there is none.
    """
    found, seen, level = [], set(), [((), content)] if isinstance(content, CONTAINERS) else []
    for _ in range(DEEPEST):
        below = []
        for place, value in level:
            if id(value) in seen:  # a pickle may hold itself
                continue
            seen.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            entries = {}
            for key, item in inner:
                if isinstance(item, Tensor):
                    if isinstance(key, str) and _is_plain(item):
                        entries[key] = item
                elif isinstance(item, CONTAINERS) and key != DECODER:
                    below.append(((*place, str(key)), item))
            if entries:
                found.append(Table(place, entries))
        level = below
    if not found:
        raise InputError(f"{path}: no state dict in this file")
    return found


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor holds numbers that can be copied into a network's."""
    odd = value.is_nested or value.is_meta or value.is_quantized or value.is_complex()
    return value.layout == torch.strided and not odd


@dataclass
class Place:
    """A dictionary and a prefix in it, below which entries have a network's names.

    Attributes:
        table: the dictionary. prefix: of the names there. spelling: which of the network's spellings they have.
        wanted: the network's own entries. names: those that are here, own name → name in `table`.
    """

    table: Table
    prefix: str
    spelling: int
    wanted: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As `--init FILE:PREFIX` has it; empty for the file's outermost names as they are."""
        return ".".join((*self.table.path, self.prefix)).strip(".")

    @property
    def where(self) -> str:
        """In words."""
        inside = f" in {shown('.'.join(self.table.path))}" if self.table.path else ""
        return inside + (f" under {shown(self.prefix)}" if self.prefix else "")

    @cached_property
    def learned(self) -> list[str]:
        """The network's entries, less counts of batches, which old files have not."""
        return [key for key in self.wanted if not key.endswith("num_batches_tracked")]

    @cached_property
    def grey(self) -> list[str]:
        """Kernels that take one channel here, and all of the input's in the network."""
        channels = next((v.shape[1] for v in self.wanted.values() if v.ndim > 3), 1)
        out = []
        for key, name in self.names.items():
            here, there = self.table.entries[name].shape, self.wanted[key].shape
            shapes = len(there) > 3 and (here[:1], here[1:2], here[2:]) == (there[:1], (1,), there[2:])
            if shapes and there[1] == channels > 1:
                out.append(key)
        return out

    @cached_property
    def others(self) -> list[str]:
        """Entries whose shapes are others than the network's."""
        grey = set(self.grey)
        return [
            key for key in self.learned
            if key in self.names and key not in grey and self.entry(key).shape != self.wanted[key].shape
        ]  # fmt: skip

    @cached_property
    def fitting(self) -> list[str]:
        """Entries, of `learned`, that fit by name and shape."""
        others = set(self.others)
        return [key for key in self.learned if key in self.names and key not in others]

    def fits(self, share: float = SHARE) -> bool:
        """Whether the network is here: at least a share of it, and nothing of another shape."""
        return not self.others and len(self.fitting) >= share * len(self.learned)

    def entry(self, key: str) -> Tensor:
        """The entry of one of the network's names, as it is in the file."""
        return self.table.entries[self.names[key]]

    def state(self) -> dict[str, Tensor]:
        """What there is of the network, by its own names and in its own types and shapes: a kernel of one channel is
        repeated for each and divided by their number, so that equal channels act as one did."""
        grey, made = set(self.grey), {}
        for key, own in self.wanted.items():
            value = self.entry(key) if key in self.names else None
            if (
                value is None or value.is_floating_point() != own.is_floating_point()
            ):  # counts in half precision overflow
                continue
            made[key] = (value.expand(own.shape) / own.shape[1] if key in grey else value).to(own.dtype)
        return made

    def unexpected(self) -> list[str]:
        """Names under the prefix that are none of the network's."""
        own = set(self.names.values())
        return [key for key in self.table.entries if key.startswith(self.prefix) and key not in own]

    def same(self, other: "Place") -> bool:
        """Whether another place has the same weights."""
        pairs = [(self.entry(key), other.entry(key)) for key in self.fitting if key in other.names]
        return self.fitting == other.fitting and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def places_of(
    tables: Sequence[Table], wanted: dict[str, Tensor], spellings: Sequence[Mapping[str, str]]
) -> list[Place]:  # fmt: skip
    """Every place with entries of a network, in the tables' order.

    Args:
        wanted: the network's state dict. spellings: how files name its entries, each name there → own name.
    """
    own: dict[str, list[tuple[int, str]]] = {}
    for number, names in enumerate(spellings):
        for name, key in names.items():
            own.setdefault(name, []).append((number, key))
    longest = 1 + max((name.count(".") for name in own), default=0)
    found = []
    for table in tables:
        here: dict[tuple[str, int], Place] = {}
        for name, value in table.entries.items():
            for prefix, ending in _endings(name, longest):
                for number, key in own.get(ending, ()):
                    if value.is_floating_point() or not wanted[key].is_floating_point():
                        place = prefix, number
                        here[place] = here.get(place) or Place(table, *place, wanted)
                        here[place].names.setdefault(key, name)
        found += here.values()
    return found


def _endings(name: str, longest: int) -> Iterator[tuple[str, str]]:
    """A name in two, at each of its dots from the last one: at most `longest` parts; then without wrappers' parts."""
    for text in dict.fromkeys((name, WRAPPERS.sub("", name))):
        start = len(text) + 1
        for _ in range(longest):
            start = text.rfind(".", 0, max(0, start - 1)) + 1
            yield text[:start], text[start:]
            if not start:
                break


def asked_for(places: Sequence[Place], prefix: str) -> list[Place]:
    """The places that `--init FILE:PREFIX` means: that of exactly this name; else those of exactly that dictionary or
    prefix; else those that have its parts one after the other among their own; else in that order, others between."""
    wanted = prefix.strip(".")
    whole = [place for place in places if place.name == wanted]
    exact = whole or [
        place for place in places
        if wanted in (place.name, place.prefix.strip("."), ".".join(place.table.path) or None)
    ]  # fmt: skip
    together = [place for place in places if f".{wanted}." in f".{place.name}."]
    return exact or together or [place for place in places if _in_that_order(wanted.split("."), place.name.split("."))]


def _in_that_order(wanted: Sequence[str], parts: Sequence[str]) -> bool:
    left = iter(parts)
    return all(part in left for part in wanted)  # each looked for behind the one before


def in_order(places: Sequence[Place], tables: Sequence[Table], own_run: bool) -> list[tuple[int, Place]]:
    """Places, first what a paper would judge, each with what its name says of it: 0 a teacher or an average, 2 a
    momentum twin, which makes keys and targets, 3 what is no weights, 1 anything else. Of one number: `FIRST`,
    the most entries, the network's own names, the file's order. Entries that two spellings find are there once.

    Args:
        tables: of the whole file. own_run: it is a run's of this project, where the student is judged.
    """
    contrast = any(CONTRASTS & {*table.path, *(name.rpartition(".")[2] for name in table.entries)} for table in tables)

    def says(place: Place) -> int:
        if any(NO_WEIGHTS.fullmatch(part) for part in place.name.split(".")):
            return 3
        parts = {part.lower() for part in re.findall("[A-Z]?[a-z]+|[A-Z]+", place.name)}
        if TEACHERS & parts:
            return 2 if own_run else 0
        if TWINS & parts:
            return 2
        return 1 if not AVERAGES & parts else 2 if contrast else 0

    def key(entry: tuple[int, Place]) -> tuple[int, int, int, int]:
        said, place = entry
        outer = place.table.path[0] if place.table.path else ""
        return said, FIRST.index(outer) if outer in FIRST else len(FIRST), -len(place.fitting), place.spelling

    out: list[tuple[int, Place]] = []
    for said, place in sorted(((says(place), place) for place in places), key=key):
        if not any(place.table is other.table and place.names == other.names for _, other in out):
            out.append((said, place))
    return out
