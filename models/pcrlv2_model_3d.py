"""PCRLv2's 3D network under its published name, whose checkpoints load strictly:

from medssl.models.pcrlv2_model_3d import PCRLv23d        (in the checkout also `models.pcrlv2_model_3d`)
network = PCRLv23d()
network.load_state_dict(torch.load("encoder.pt", weights_only=True)["state_dict"])
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.models.heads import global_average
from medssl.models.unet3d import ConvNorm3d, UNet3d, Up3d


class ScaleUp3d(Up3d):
    """A level of the way up, with PCRLv2's heads: projection p, prediction q and restoration."""

    def __init__(self, c_in: int, c_skip: int, c_out: int, norm: str = "batch") -> None:
        super().__init__(c_in, c_skip, c_out, norm)
        c = c_out
        self.bn = nn.BatchNorm1d(c)
        self.predictor_head = nn.Sequential(
            nn.Linear(c, 2 * c), nn.BatchNorm1d(2 * c), nn.ReLU(inplace=True), nn.Linear(2 * c, c)
        )
        self.deep_supervision_head = ConvNorm3d(c, 1, norm, nn.Sigmoid())

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The level's map (B, C, *S) → p = BN(GAP(x)) and q = predictor(p), both (B, C)."""
        # Not `mean`, whose gradient is stored before it is added to the map's: four times slower on large maps.
        # float16 cannot hold the sum.
        total = x.flatten(2).sum(2, dtype=torch.float32 if x.dtype == torch.float16 else None)
        p = self.bn(total / x[0, 0].numel())
        return p, self.predictor_head(p)


class PCRLv23d(UNet3d):
    """3D U-Net, without skips as published, with PCRLv2's heads at every decoder level (arXiv 2301.00772, §3).

    Args:
        n_class: channels of the restoration.
        in_channels: of the input.
        width: channels of the first level.
        norm: "batch", "group" or "instance".
        skips: whether the way up sees the maps of the way down.
    """

    up_block = ScaleUp3d
    levels = 3  # of the way up

    def __init__(
        self, n_class: int = 1, in_channels: int = 1, width: int = 64, norm: str = "batch", skips: bool = False
    ) -> None:
        super().__init__(n_class, skips, in_channels, width, norm)

    def forward(self, x: Tensor, levels: Sequence[int] = (0, 1, 2), restore: int | None = None) -> dict[str, Tensor]:
        """Embed a batch of volumes at the drawn levels, and restore it if asked; nothing else is computed.

        Args:
            x: (B, in_channels, X, Y, Z) normalised volumes, sides at least 8.
            levels: decoder levels (0 deepest) whose embeddings are wanted.
            restore: the level whose intermediate restoration is wanted, beside the full one.

        Returns:
            "feature" (B, C) the encoder's pooled map; "p{i}" and "q{i}" (B, C_i) for each level i; with
            `restore` also "restored" (B, n_class, X, Y, Z) and "intermediate" (B, 1, X, Y, Z), both in [0, 1].
        """
        features = self.encode(x)
        maps = self.decode(features, None if restore is not None else max(levels) + 1)
        out = {"feature": global_average(features[-1].detach())}
        for i in sorted(set(levels)):
            out[f"p{i}"], out[f"q{i}"] = self.up_blocks[i].embed(maps[i])
        if restore is not None:
            out["restored"] = torch.sigmoid(self.out_tr(maps[-1]))
            coarse = self.up_blocks[restore].deep_supervision_head(maps[restore])
            out["intermediate"] = F.interpolate(coarse, size=x.shape[2:], mode="trilinear")
        return out

    def encoder_state(self) -> dict[str, Tensor]:
        """What is exported: the whole network, under the published names."""
        return self.state_dict()

    def parts(self) -> list[nn.Module]:
        """What `--compile` compiles."""
        down = [self.down_tr64, self.down_tr128, self.down_tr256, self.down_tr512]
        return [*down, *self.up_blocks, *(block.deep_supervision_head for block in self.up_blocks)]
