"""Files and pictures that a method leaves: its encoder, and what it sees."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from medssl.engine.checkpoint import FORMAT_VERSION, save_atomic
from medssl.engine.method import Method
from medssl.engine.monitor import middle_slices, save_pictures, stretch
from medssl.views.of_images import Views
from medssl.views.ops2d import denormalise


def save_views(method: Method, inputs: dict[str, Tensor], views: Views, path: Path) -> None:
    """Write a picture of what the method sees, without changing it (evaluation mode, no gradient)."""
    was_training = method.training
    method.eval()
    with torch.no_grad():
        rows = method.pictures(inputs)
    method.train(was_training)
    images = {name: x.float() for name, x in rows.items()}
    if not views.mean:  # volumes, each normalised by itself
        save_pictures({name: middle_slices(stretch(x)) for name, x in images.items()}, path, columns=4)
    else:
        save_pictures({name: denormalise(x, views.mean, views.std) for name, x in images.items()}, path)


def export_encoder(method: Method, views: Views, args: argparse.Namespace, info: object, folder: Path) -> None:
    """Write `encoder.pt`, what fine-tuning and other tools load."""

    def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().cpu().contiguous() for k, v in state.items()}

    decoder = method.decoder_state()
    content = {
        "state_dict": plain_state(method.encoder_state()),
        **({} if decoder is None else {"decoder_state_dict": plain_state(decoder)}),
        "arch": args.arch,
        "dims": info.dims,
        "channels": 3 if info.dims == 2 else 1,
        "method": type(method).__name__,
        "normalization": {"mean": list(views.mean), "std": list(views.std)} if info.dims == 2 else {"kind": views.kind},
        "version": FORMAT_VERSION,
    }
    save_atomic(content, folder / "encoder.pt")
