"""Small heads on top of encoders and decoders, for 2 or 3 spatial dimensions."""

from torch import Tensor, nn

Conv = {2: nn.Conv2d, 3: nn.Conv3d}
BatchNorm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def global_average(x: Tensor) -> Tensor:
    """Global average pooling: (B, C, *S) → (B, C)."""
    return x.flatten(2).mean(2)


class ScaleHead(nn.Module):
    """PCRLv2's heads at one decoder level (arXiv 2301.00772, §3): projection p, prediction q, restoration.

    Args:
        channels: C of the decoder level.
        out_channels: of the restored image.
        dims: spatial dimensions. 2D restores with conv3–BN–ReLU–conv1, 3D with conv3–BN–sigmoid, as published.
    """

    def __init__(self, channels: int, out_channels: int, dims: int = 2) -> None:
        super().__init__()
        c = channels
        self.norm = nn.BatchNorm1d(c)
        self.predictor = nn.Sequential(
            nn.Linear(c, 2 * c), nn.BatchNorm1d(2 * c), nn.ReLU(inplace=True), nn.Linear(2 * c, c)
        )
        if dims == 2:
            self.restore = nn.Sequential(
                Conv[2](c, c, 3, padding=1),
                BatchNorm[2](c),
                nn.ReLU(inplace=True),
                Conv[2](c, out_channels, 1),
            )
        else:
            self.restore = nn.Sequential(
                Conv[dims](c, out_channels, 3, padding=1), BatchNorm[dims](out_channels), nn.Sigmoid()
            )

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder map (B, C, *S) → p = BN(GAP(x)) and q = predictor(p), both (B, C)."""
        p = self.norm(global_average(x))
        return p, self.predictor(p)
