"""3D U-Net 64/128/256/512, with and without skip connections, in the layout and key names that 3D PCRL, PCRLv2 and
Models Genesis published (`down_tr64.ops.0.conv1.weight`, …)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name -> channels of the first level; every further one has twice as many. Key names stay those of the full width.
WIDTHS = {"unet3d": 64, "unet3d_half": 32, "unet3d_quarter": 16}

NORMS = {
    "batch": nn.BatchNorm3d,
    "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    "instance": lambda channels: nn.InstanceNorm3d(channels, affine=True),
}

# Time of a multiplication inside a joined kernel, which is a small and awkward product, over one in a convolution.
JOINING_COST = 5


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3×3×3 convolution with padding 1."""
    if x.device.type == "cpu" and x.shape[2] == 2:
        # In bfloat16, oneDNN 3.13 leaves parts of the weight's gradient unset where the first side is 2, which it is
        # in the deepest level for local cubes of 16³. Maps that small cost nothing in full precision.
        with torch.autocast("cpu", enabled=False):
            return F.conv3d(x.to(weight.dtype), weight, bias, padding=1)
    return F.conv3d(x, weight, bias, padding=1)


class Conv3d(nn.Conv3d):
    """3×3×3 convolution with padding 1, as `convolve`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias)


class ConvNorm3d(nn.Module):
    """3×3×3 convolution, norm (a key of `NORMS`), activation."""

    def __init__(self, c_in: int, c_out: int, norm: str = "batch", activation: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = Conv3d(c_in, c_out)
        self.bn1 = NORMS[norm](c_out)
        self.activation = activation or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn1(self.conv1(x)))


class Down3d(nn.Module):
    """Two convolutions; the first has half the level's channels."""

    def __init__(self, c_in: int, c_out: int, norm: str = "batch") -> None:
        super().__init__()
        self.ops = nn.Sequential(ConvNorm3d(c_in, c_out // 2, norm), ConvNorm3d(c_out // 2, c_out, norm))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(x)


class Up3d(nn.Module):
    """Up-sample by a transposed convolution, concatenate the skipped map if there is one, then two convolutions.

    Args:
        c_in: channels of the map to up-sample, which the transposed convolution keeps.
        c_skip: channels of the skipped map; 0 for none.
        c_out: channels of the result.
    """

    def __init__(self, c_in: int, c_skip: int, c_out: int, norm: str = "batch") -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(c_in, c_in, 2, stride=2)
        self.ops = nn.Sequential(ConvNorm3d(c_in + c_skip, c_out, norm), ConvNorm3d(c_out, c_out, norm))

    def forward(self, x: Tensor, size: Sequence[int], skip: Tensor | None = None) -> Tensor:
        """(B, c_in, *S) → (B, c_out, *size), where size is 2·S, or one voxel more along any axis."""
        first = self.ops[0]
        size = tuple(size)
        if size == tuple(2 * n for n in x.shape[2:]) and joining_pays(self.up_conv, first.conv1, len(x), size):
            x = up_and_convolve(x, self.up_conv, first.conv1, skip)
        else:
            x = self.up_conv(x)
            if x.shape[2:] != size:  # the level had an odd side: its last voxels repeat
                x = F.pad(x, [p for n, m in zip(size[::-1], x.shape[:1:-1]) for p in (0, n - m)], mode="replicate")
            x = first.conv1(x if skip is None else torch.cat([x, skip], 1))
        return self.ops[1](first.activation(first.bn1(x)))


def joining_pays(up: nn.ConvTranspose3d, conv: nn.Conv3d, batch: int, size: Sequence[int]) -> bool:
    """Whether `up_and_convolve` takes less time than one layer after the other, for an output (batch, …, *size)."""
    c_in, c_mid, c_out = up.in_channels, up.out_channels, conv.out_channels
    saved = c_in * c_mid + 27 * c_mid * c_out - 8 * c_in * c_out  # multiplications a voxel
    return batch * math.prod(size) * saved > JOINING_COST * 8 * 27 * c_in * c_mid * c_out


def up_and_convolve(x: Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d, skip: Tensor | None = None) -> Tensor:
    """`conv(cat([up(x), skip], 1))` for a 2×2×2 transposed convolution and a 3×3×3 one, up to rounding.

    Nothing lies between the two, so they are one linear map: a transposed convolution with a 4×4×4 kernel, of which
    each output voxel sees 8 taps in place of 27 + 1. With the U-Net's channels it takes a quarter of the
    multiplications, and the up-sampled map is never stored.

    Args:
        x: (B, C, X, Y, Z). skip: (B, C_skip, 2X, 2Y, 2Z), or None.

    Returns:
        (B, C_out, 2X, 2Y, 2Z).
    """
    middle = up.out_channels
    weight, rest = conv.weight[:, :middle], conv.weight[:, middle:]
    # The first bias counts only where the second kernel lies inside: it becomes the weight of a channel of ones, which
    # like any other is nothing outside. (Adding a map of it to the result would take twice the time.)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    first = torch.cat([up.weight, up.bias.view(1, middle, 1, 1, 1).expand(-1, -1, 2, 2, 2)])  # (C + 1, middle, 2, 2, 2)
    # The two kernels' product is a transposed convolution of the first, taken as C + 1 images of 2×2×2 voxels.
    joined = F.conv_transpose3d(first, weight.flip(2, 3, 4).transpose(0, 1))  # (C + 1, C_out, 4, 4, 4)
    y = F.conv_transpose3d(x, joined, conv.bias, stride=2, padding=1)
    return y if skip is None else y + convolve(skip, rest)


class UNet3dEncoder(nn.Module):
    """The way down: four levels, each of half the size of the one above.

    `encoder(x)` maps x (B, channels, X, Y, Z), sides at least 8, to the four levels' maps, shallow to deep: level i
    is (B, out_channels[i], X/2^i, Y/2^i, Z/2^i), rounded down.

    Args:
        channels: of the input.
        width: channels of the first level; see `WIDTHS`.
        norm: "batch", "group" or "instance".
    """

    def __init__(self, channels: int = 1, width: int = 64, norm: str = "batch") -> None:
        super().__init__()
        self.channels, self.width, self.norm = channels, width, norm
        self.out_channels = tuple(width << i for i in range(4))
        a, b, c, d = self.out_channels
        self.down_tr64 = Down3d(channels, a, norm)
        self.down_tr128 = Down3d(a, b, norm)
        self.down_tr256 = Down3d(b, c, norm)
        self.down_tr512 = Down3d(c, d, norm)

    def encode(self, x: Tensor) -> list[Tensor]:
        maps = [self.down_tr64(x)]
        for level in (self.down_tr128, self.down_tr256, self.down_tr512):
            maps.append(level(F.max_pool3d(maps[-1], 2)))
        return maps

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encode(x)


class UNet3d(UNet3dEncoder):
    """The whole network: way down, way up, and a 1×1×1 output layer. (B, channels, *S) → logits (B, labels, *S).

    Args:
        labels: channels of the output.
        skips: whether the way up sees the maps of the way down.
        channels, width, norm: as for the encoder.
    """

    up_block = Up3d

    def __init__(
        self, labels: int = 1, skips: bool = True, channels: int = 1, width: int = 64, norm: str = "batch"
    ) -> None:
        super().__init__(channels, width, norm)
        self.skips = skips
        a, b, c, d = self.out_channels
        self.up_tr256 = self.up_block(d, c * skips, c, norm)
        self.up_tr128 = self.up_block(c, b * skips, b, norm)
        self.up_tr64 = self.up_block(b, a * skips, a, norm)
        self.out_tr = nn.Sequential()
        self.out_tr.final_conv = nn.Conv3d(a, labels, 1)

    @property
    def encoder(self) -> UNet3dEncoder:
        """The way down as a module of its own, which shares its layers with this one."""
        with torch.device("meta"):
            encoder = UNet3dEncoder(self.channels, self.width, self.norm)
        for name, _ in list(encoder.named_children()):
            setattr(encoder, name, getattr(self, name))
        return encoder

    @property
    def up_blocks(self) -> list[nn.Module]:
        """The way up, deep to shallow."""
        return [self.up_tr256, self.up_tr128, self.up_tr64]

    def decode(self, features: Sequence[Tensor], depth: int | None = None) -> list[Tensor]:
        """Decode.

        Args:
            features: the maps of `encode`, whose sizes the levels take.
            depth: compute the first `depth` levels only; all three by default.

        Returns:
            The maps of the computed levels, deep to shallow: level i has 1/2^(2−i) of the input's size.
        """
        x, levels = features[-1], []
        for block, mirrored in list(zip(self.up_blocks, features[-2::-1]))[:depth]:
            x = block(x, mirrored.shape[2:], mirrored if self.skips else None)
            levels.append(x)
        return levels

    def forward(self, x: Tensor) -> Tensor:
        return self.out_tr(self.decode(self.encode(x))[-1])


class DeepUNet3d(UNet3d):
    """A `UNet3d` with an output for every level of the way up, for deep supervision: in training (B, channels, *S) →
    logits of the levels, shallow to deep, each up-sampled to (B, labels, *S); else the last one's alone."""

    def __init__(self, labels: int, channels: int = 1, width: int = 64, norm: str = "batch") -> None:
        super().__init__(labels, True, channels, width, norm)
        self.deep = nn.ModuleList(nn.Conv3d(c, labels, 1) for c in self.out_channels[1:3])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        coarse, middle, fine = self.decode(self.encode(x))
        logits = [self.out_tr(fine)]
        if not self.training:
            return logits[0]
        for layer, level in zip(self.deep, (middle, coarse)):
            logits.append(F.interpolate(layer(level), size=x.shape[2:], mode="trilinear"))
        return logits
