"""PCRL's U-Nets: with skips, an embedding of the deepest map, and attention on it that asks for a context (Zhou et al.,
ICCV 2021, arXiv 2109.04379, §3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.models.encoders import width_of
from medssl.models.heads import global_average
from medssl.models.unet2d import UNet2d
from medssl.models.unet3d import UNet3d

CHANNELS = {2: 3, 3: 1}  # of inputs and restorations, by dimension


class ContextHeads:
    """What PCRL adds to a U-Net with skips, under the published names: an embedding of the deepest map, and attention
    on it by a transform code."""

    def add_heads(self, channels: int, axes: int, dim: int = 128, hidden: int = 256) -> None:
        """`channels` of the deepest map; a code has axes + 4 numbers."""
        self.fc1, self.fc2 = nn.Linear(channels, dim), nn.Linear(dim, dim)
        self.aug_fc1, self.aug_fc2 = nn.Linear(axes + 4, hidden), nn.Linear(hidden, channels)

    def embed(self, deepest: Tensor) -> tuple[Tensor, Tensor]:
        """The deepest map (B, C, *S) → its average (B, C) and the embedding (B, 128)."""
        features = global_average(deepest)
        return features, self.fc2(F.relu(self.fc1(features)))

    def attention(self, code: Tensor) -> Tensor:
        """Codes (B, axes + 4) → a, (B, C) in (0, 1)."""
        return torch.sigmoid(self.aug_fc2(F.relu(self.aug_fc1(code))))

    def forward(self, x: Tensor, *others: Tensor, decode: bool = False) -> dict[str, Tensor] | Tensor:
        """Encode images, or decode maps.

        Args:
            x: (B, C, *S) images; with `decode` the shallowest map, followed by the others.

        Returns:
            {"features", "z", "maps": shallow to deep}, or the restored image (B, C, *S).
        """
        if decode:
            return self.restore([x, *others])
        maps = self.encode(x)
        features, z = self.embed(maps[-1])
        return {"features": features, "z": z, "maps": list(maps)}


class ContextUNet2d(ContextHeads, UNet2d):
    """2D U-Net with skips on any encoder. The first of its maps is the image itself, whose size a restoration has."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch, CHANNELS[2])
        self.add_heads(self.encoder.out_channels[-1], axes=2)

    def encode(self, x: Tensor) -> list[Tensor]:
        return self.encoder(x)

    def restore(self, maps: list[Tensor]) -> Tensor:
        return self.decode(maps)

    def encoder_state(self) -> dict[str, Tensor]:
        """What is exported: the encoder, with torchvision's names."""
        return self.encoder.state_dict()

    def decoder_state(self) -> dict[str, Tensor]:
        """What is exported beside it."""
        return self.decoder.state_dict()


class ContextUNet3d(ContextHeads, UNet3d):
    """3D U-Net with skips; restorations are in [0, 1]. All keys are the published ones."""

    def __init__(self, arch: str) -> None:
        super().__init__(CHANNELS[3], width=width_of(arch))
        self.add_heads(self.out_channels[-1], axes=3)

    def restore(self, maps: list[Tensor]) -> Tensor:
        return torch.sigmoid(self.out_tr(self.decode(maps)[-1]))

    def encoder_state(self) -> dict[str, Tensor]:
        """What is exported: the whole network, under the published names."""
        return self.state_dict()

    def decoder_state(self) -> None:
        """It is in there."""


def attend(maps: list[Tensor], attention: Tensor) -> list[Tensor]:
    """Multiply the deepest map (B, C, *S) channel by channel with (B, C)."""
    deepest = maps[-1]
    return [*maps[:-1], deepest * attention.view(*attention.shape, *[1] * (deepest.ndim - 2))]


def blend(one: list[Tensor], other: list[Tensor], weight: float) -> list[Tensor]:
    """weight · one + (1 − weight) · other, map by map."""
    return [torch.lerp(b, a, weight) for a, b in zip(one, other)]
