"""Protocols of fine-tuning: whose values options have that are not given."""

import argparse
from collections.abc import Collection, Iterable, Mapping

from medssl.engine import options
from medssl.models.encoders import default_arch

Protocols = Mapping[str, Mapping[str, object]]


def add_protocol(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """The option that names one."""
    names = tuple(dict.fromkeys(names))
    group.add_argument(
        "--protocol", choices=("auto", *names), default="auto", metavar="NAME",
        help=f"whose values options have that are not given; auto: ours, by the data set; or {', '.join(names)}",
    )  # fmt: skip


def protocol_of(args: argparse.Namespace, ours: str) -> str:
    """The protocol that is asked for, or `ours`, the data set's."""
    return ours if args.protocol == "auto" else args.protocol


def complete(
    args: argparse.Namespace, protocols: Protocols, ours: str, dims: int, given: Collection[str],
    always: Mapping[str, object] | None = None,
) -> argparse.Namespace:  # fmt: skip
    """The options with the values of the protocol where the user typed none, and the encoder of the file that `--init`
    names, else the protocol's or the dimension's. What `--protocol auto` chooses is called "ours".

    Args:
        protocols: values by name. ours: the data set's. given: names of the options that were typed.
        always: values where neither user nor protocol has one.
    """
    values = protocols[protocol_of(args, ours)]
    arch = args.arch if "arch" in given else default_arch([args.init], dims, values.get("arch"))
    made = options.complete(args, {**(always or {}), **values, "arch": arch}, given)
    made.protocol = "ours" if args.protocol == "auto" else args.protocol
    return made
