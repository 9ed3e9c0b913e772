"""Checkpoint files that `--init` names: what they say, and where in them a network's weights are."""

import contextlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from medssl.engine.checkpoint import SAVE_ANEW, load_safe
from medssl.engine.entries import Place, Table, asked_for, in_order, places_of, shown, tables_of
from medssl.errors import InputError, unusable
from medssl.files import split_init

METADATA = "medssl"  # under which prepare_models.py keeps what a flat state dict has no place for


@dataclass(frozen=True)
class Weights:
    """A checkpoint file.

    Attributes:
        init: as it was given, FILE or FILE:PREFIX. path: the file. prefix: what is asked for of it, or None.
        content: what is in it.
    """

    init: str
    path: Path
    prefix: str | None
    content: object

    @classmethod
    def read(cls, init: str | Path) -> "Weights":
        """Read the file; an InputError where it cannot be."""
        path, prefix = split_init(init)
        return cls(str(init), Path(path), prefix, load_safe(path))

    def looking(self) -> contextlib.AbstractContextManager[None]:
        """A block in which what is in the file is looked at: whatever that raises, the file is laid out as no
        checkpoint is, which an InputError says."""
        return unusable(self.path, f"not laid out as a checkpoint; {SAVE_ANEW}")

    @property
    def own_run(self) -> bool:
        """Whether it is a run's last.pt, whose student is the encoder."""
        fields = self.content if isinstance(self.content, dict) else {}
        return all(isinstance(fields.get(name), dict) for name in ("method", "config", "optimizer"))

    @cached_property
    def fields(self) -> dict:
        """What it says beside its entries. Of a file of others, whose words may mean anything, the architecture."""
        content = self.content if isinstance(self.content, dict) else {}
        if not self.own_run:
            # All files that this project writes have both.
            ours = "arch" in content and type(content.get("dims")) is int and content["dims"] in (2, 3)
            beside = getattr(content, "_metadata", None)
            said = beside.get(METADATA) if isinstance(beside, dict) else None
            return {**(said if isinstance(said, dict) else {}), **(content if ours else {"arch": content.get("arch")})}
        beside = self.path.with_name("encoder.pt")  # which knows what inputs were
        exported = load_safe(beside) if beside.is_file() else None
        known = exported.get("normalization") if isinstance(exported, dict) else None
        return {"arch": content["config"].get("arch"), "version": content.get("version"), "normalization": known}

    @cached_property
    def tables(self) -> list[Table]:
        """Its dictionaries of entries; an InputError where there are none."""
        return tables_of(self.content["method"] if self.own_run else self.content, self.path)

    def places(self, network: nn.Module) -> list[Place]:
        """Where there are entries of a network; of the prefix that is asked for, where one is."""
        found = places_of(self.tables, network.state_dict(), spellings(network))
        return found if self.prefix is None else asked_for(found, self.prefix)

    def best(self, places: Sequence[Place], share: float) -> list[Place]:
        """Places of a whole network, or of that share of it, first the one that is taken: what the file's paper would
        judge. Notes where others fit as well, with other weights, and no name tells which is meant."""
        order = in_order([place for place in places if place.fits(share)], self.tables, self.own_run)
        found = [place for _, place in order]
        unclear = [shown(place.name) for said, place in order[1:] if said == order[0][0] and not place.same(found[0])]
        if unclear:
            print(
                f"note: {self.init}: {shown(found[0].name) or 'the outermost'} taken, and {' and '.join(unclear[:5])} "
                f"would fit as well, with other weights; --init {self.path}:{unclear[0]} takes that",
                file=sys.stderr,
            )
        return found

    def check_prefix(self, network: nn.Module, share: float) -> None:
        """Raise InputError for a prefix under which there is no entry of a network, naming those that fit."""
        if self.prefix is None or self.places(network):
            return
        found = places_of(self.tables, network.state_dict(), spellings(network))
        names = [f"{self.path}:{shown(place.name)}" for place in found if place.fits(share)]
        raise InputError(f"{self.init}: no such prefix in the file; {', '.join(names[:9]) or 'none'} would fit")


def spellings(network: nn.Module) -> list[dict[str, str]]:
    """How files name a network's entries: each name there → own name.

    As they are; by numbers, as an nn.Sequential of the network's parts has them (lightly's tutorials); without the one
    outermost name, where all have it, as a DenseNet's `features` alone do; and as DenseNets were saved before
    torchvision 0.3, `norm.1` for `norm1`.
    """
    own = list(network.state_dict())
    numbers = {name: str(number) for number, (name, _) in enumerate(network.named_children())}
    parts = {key: key.partition(".") for key in own}
    made = [{key: key for key in own}]
    made.append({f"{numbers.get(first, first)}{dot}{rest}": key for key, (first, dot, rest) in parts.items()})
    if len({first for first, _, _ in parts.values()}) == 1:
        made.append({rest: key for key, (_, _, rest) in parts.items()})
    old = [{re.sub(r"(\.denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): names[name] for name in names}
           for names in made]  # fmt: skip
    return made + [names for names in old if names not in made]
