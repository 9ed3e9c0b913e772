"""U-Nets that restore images and volumes in [0, 1]: Models Genesis' (Zhou et al., MICCAI 2019, arXiv 1908.06912) and
MAGICAL's, which embeds images, too (Neural Networks 167, 2023)."""

import torch
from torch import Tensor

from medssl.models.encoders import width_of
from medssl.models.heads import global_average, mlp, norm_mlp
from medssl.models.unet2d import UNet2d
from medssl.models.unet3d import UNet3d

PROJECTORS = {"plain": mlp, "norm": norm_mlp}  # MAGICAL's published one, and SimCLR's, with a batch norm inside
DIM = 128  # of an embedding


class RestoringUNet2d(UNet2d):
    """2D U-Net on any encoder, whose output is an image in [0, 1]. Arguments as `UNet2d`."""

    def restore(self, maps: list[Tensor]) -> Tensor:
        """The encoder's maps, shallow to deep, of which the first is the image → (B, outputs, H, W), float32."""
        return torch.sigmoid(self.decode(maps).float())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised → "features" (B, F) the deepest map's average, "restored" (B, outputs, H, W)."""
        maps = self.encoder(x)
        return {"features": global_average(maps[-1].detach()), "restored": self.restore(maps)}

    def encoder_state(self) -> dict[str, Tensor]:
        """What is exported: the encoder, with torchvision's names."""
        return self.encoder.state_dict()

    def decoder_state(self) -> dict[str, Tensor] | None:
        """What is exported beside it, where the decoder has skips."""
        return self.decoder.state_dict() if self.decoder.skips else None


class EmbeddingUNet2d(RestoringUNet2d):
    """The same with a projector of its deepest map: MAGICAL's.

    Args:
        arch: encoder name.
        outputs: channels of the restoration.
        skips: whether the decoder sees the encoder's maps. projector: a key of `PROJECTORS`.
        joint: whether images and changed ones share their batch statistics.
    """

    def __init__(
        self, arch: str, outputs: int, skips: bool = True, projector: str = "plain", joint: bool = True
    ) -> None:
        super().__init__(arch, outputs, skips)
        width = self.encoder.out_channels[-1]
        self.projector = PROJECTORS[projector](width, width, DIM)
        self.joint = joint

    def forward(self, x: Tensor, changed: Tensor | None = None) -> dict[str, Tensor]:
        """Restore images, and embed them beside others.

        Where they are `joint`, both go through the encoder at once: had each its own batch statistics, their running
        averages, with which the network is validated and exported, would fit neither.

        Args:
            x: (B, 3, H, W) normalised, what is restored where `changed` is not given.
            changed: (B, 3, H, W) normalised, what is restored then.

        Returns:
            "restored" (B, outputs, H, W) in [0, 1] and "features" (B, F) of x; with `changed` also "z" and "z_changed",
            (B, 128).
        """
        if changed is None:
            return super().forward(x)
        if self.joint:
            maps = self.encoder(torch.cat([x, changed]))
        else:
            maps = [torch.cat(levels) for levels in zip(self.encoder(x), self.encoder(changed))]
        features = global_average(maps[-1].float())
        z, z_changed = self.projector(features).chunk(2)
        restored = self.restore([m[len(x) :] for m in maps])
        return {"restored": restored, "features": features[: len(x)], "z": z, "z_changed": z_changed}


class RestoringUNet3d(UNet3d):
    """3D U-Net with skips, whose output is a volume in [0, 1]: Models Genesis', under the published keys.

    Args:
        arch: a key of `unet3d.WIDTHS`.
    """

    def __init__(self, arch: str) -> None:
        super().__init__(labels=1, width=width_of(arch))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 1, X, Y, Z) in [0, 1] → "features" (B, F) the deepest map's average, "restored" (B, 1, X, Y, Z)."""
        maps = self.encode(x)
        restored = torch.sigmoid(self.out_tr(self.decode(maps)[-1]).float())
        return {"features": global_average(maps[-1].detach()), "restored": restored}

    def encoder_state(self) -> dict[str, Tensor]:
        """What is exported: the whole network, under the published names."""
        return self.state_dict()

    def decoder_state(self) -> None:
        """None: `encoder_state` is the whole network, its decoder included."""
