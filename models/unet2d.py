"""2D U-Net decoder over any encoder, without skip connections (PCRLv2's; skips arrive with their first user)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODER_CHANNELS = (256, 128, 64, 32, 16)


def conv_norm_relu(c_in: int, c_out: int) -> nn.Sequential:
    """3×3 convolution, batch norm, ReLU; key names as in segmentation-models-pytorch."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """Up-sample (nearest) to the next size, then two convolutions."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(c_in, c_out)
        self.conv2 = conv_norm_relu(c_out, c_out)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv2(self.conv1(F.interpolate(x, size=size, mode="nearest")))


class Decoder2d(nn.Module):
    """Five up-sampling blocks from the deepest feature map to the input's size.

    Args:
        encoder_channels: `encoder.out_channels`, shallow to deep.
        channels: of each level, deep to shallow.
    """

    def __init__(self, encoder_channels: Sequence[int], channels: Sequence[int] = DECODER_CHANNELS) -> None:
        super().__init__()
        c_in = [encoder_channels[-1], *channels[:-1]]
        self.blocks = nn.ModuleList(DecoderBlock(a, b) for a, b in zip(c_in, channels))

    def forward(self, features: Sequence[Tensor], depth: int | None = None) -> list[Tensor]:
        """Decode.

        Args:
            features: the encoder's maps, shallow to deep; each level takes the size of the map it mirrors,
                so inputs whose side is no multiple of 32 come back at their own size.
            depth: compute the first `depth` levels only; all by default.

        Returns:
            The maps of the computed levels, deep to shallow: level i is (B, channels[i], H/2^(4-i), W/2^(4-i)).
        """
        sizes = [f.shape[2:] for f in features[-2::-1]]
        x, levels = features[-1], []
        for block, size in list(zip(self.blocks, sizes))[:depth]:
            x = block(x, size)
            levels.append(x)
        return levels
