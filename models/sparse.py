"""Convolutional encoders of images some of whose patches are hidden: what is hidden stays zero in every layer, and
batch norms do not count it (SparK: Tian et al., ICLR 2023, arXiv 2301.03580, §3.1 and 3.2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.errors import InputError
from medssl.models.unet3d import Conv3d

# Layers that bring values from one position to others, after which hidden ones are emptied again.
SPREADING = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.AvgPool2d)
POINTWISE = (nn.ReLU, nn.Identity)  # keep zero zero


class Visible:
    """What is visible at the sizes of an encoder's maps.

    Args:
        patches: (B, 1, *grid) bool, 1 where a patch is seen.
        sides: of the image *S, multiples of the grid's.
    """

    def __init__(self, patches: Tensor, sides: Sequence[int]) -> None:
        self.pixels = F.interpolate(patches.float(), size=tuple(sides))
        self.found: dict[tuple, Tensor] = {}

    def at(self, size: Sequence[int], dtype: torch.dtype = torch.bool) -> Tensor:
        """(B, 1, *size) of a type: 1 where any pixel under a map's position is seen. With patches of the encoder's
        stride or more, that is the patches' mask by nearest neighbour; smaller ones share a position of deep maps."""
        key = (*size, dtype)
        if key not in self.found:
            pool = F.adaptive_max_pool2d if self.pixels.ndim == 4 else F.adaptive_max_pool3d
            self.found[key] = pool(self.pixels, tuple(size)).to(dtype)
        return self.found[key]

    def hide(self, x: Tensor) -> Tensor:
        """(B, C, *size) with zeros where it is hidden."""
        return x * self.at(x.shape[2:], x.dtype)


# Of the call under way. DataParallel's replicas share hooks, but each runs in a thread, which has a value of its own.
_VISIBLE: ContextVar[Visible | None] = ContextVar("visible", default=None)


@contextmanager
def seeing(patches: Tensor, sides: Sequence[int]) -> Iterator[Visible]:
    """Within it, encoders of `make_sparse` see these patches alone; outside they are dense. Arguments as `Visible`."""
    visible = Visible(patches, sides)
    token = _VISIBLE.set(visible)
    try:
        yield visible
    finally:
        _VISIBLE.reset(token)


def _hide(_layer: nn.Module, _inputs: tuple, x: Tensor) -> Tensor:
    """A layer's output within `seeing`: a forward hook."""
    visible = _VISIBLE.get()
    return x if visible is None else visible.hide(x)


class _VisibleNorm:
    """Batch norm whose statistics, running ones too, are those of visible positions; others stay zero."""

    def forward(self, x: Tensor) -> Tensor:
        visible = _VISIBLE.get()
        if visible is None:
            return super().forward(x)
        if not self.training:
            return visible.hide(super().forward(x))
        # Sums in place of a selection, whose size a GPU would have to be waited for, and whose gradient is no
        # deterministic operation there.
        mask = visible.at(x.shape[2:], torch.float32)  # (B, 1, *S)
        axes, shape = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        count = mask.sum().clamp(min=1)
        mean = (x.float() * mask).sum(axes) / count  # (C,)
        centred = (x.float() - mean.view(shape)) * mask
        var = centred.square().sum(axes) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape) * mask).to(x.dtype)


class VisibleNorm2d(_VisibleNorm, nn.BatchNorm2d):
    """Of images."""


class VisibleNorm3d(_VisibleNorm, nn.BatchNorm3d):
    """Of volumes."""


VISIBLE_NORMS = {nn.BatchNorm2d: VisibleNorm2d, nn.BatchNorm3d: VisibleNorm3d}
# Others have squeeze-and-excitation, attention, or sides that are no powers of two of the image's; some of them within
# functions, which their layers do not show.
FAMILIES = ("resnet", "resnext", "densenet", "unet3d")


def make_sparse(encoder: nn.Module, arch: str) -> nn.Module:
    """The encoder itself, changed so that within `seeing` it sees visible patches only; its entries keep their names.

    Raises:
        InputError: for an encoder of none of `FAMILIES`, or with layers that they have not, such as other norms than
            batch norm.
    """
    layers = [layer for layer in encoder.modules() if not list(layer.children())]
    known = all(isinstance(layer, (*SPREADING, *POINTWISE)) or type(layer) in VISIBLE_NORMS for layer in layers)
    if not (known and arch.startswith(FAMILIES)):
        raise InputError(
            f"--arch {arch}: its layers cannot leave hidden patches out; those of resnet18, resnet34, resnet50 … 152, "
            "resnext and densenet121 … 201 can, in 3D those of unet3d"
        )
    for layer in layers:
        if isinstance(layer, SPREADING):
            layer.register_forward_hook(_hide)
        elif type(layer) in VISIBLE_NORMS:
            layer.__class__ = VISIBLE_NORMS[type(layer)]  # the same parameters and buffers, in the same place
    return encoder


class Densify(nn.Module):
    """φ(S′): batch norm over what is visible, a learnt embedding everywhere else, a projection (paper, §3.2).

    Args:
        c_in, c_out: channels of an encoder's map, and of the decoder there.
        deepest: whether it is the deepest map, whose projection sees a position alone; those of others see 3 × 3.
        dims: spatial dimensions.
    """

    def __init__(self, c_in: int, c_out: int, deepest: bool, dims: int) -> None:
        super().__init__()
        norm, one = (VisibleNorm2d, nn.Conv2d) if dims == 2 else (VisibleNorm3d, nn.Conv3d)
        self.norm = norm(c_in)
        self.embedding = nn.Parameter(0.02 * torch.randn(1, c_in, *[1] * dims))
        wide = nn.Conv2d(c_in, c_out, 3, padding=1) if dims == 2 else Conv3d(c_in, c_out)
        self.project = one(c_in, c_out, 1) if deepest else wide

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Map (B, c_in, *S) within `seeing`, and what is visible of it, (B, 1, *S) bool → (B, c_out, *S)."""
        return self.project(torch.where(visible, self.norm(x), self.embedding))
