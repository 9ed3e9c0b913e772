"""2D U-Net over any encoder, with and without skip connections."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from torch import Tensor, nn

from medssl.models.encoders import make_encoder

DECODER_CHANNELS = (256, 128, 64, 32, 16)


def conv_norm_relu(c_in: int, c_out: int) -> nn.Sequential:
    """3×3 convolution, batch norm, ReLU; key names as in segmentation-models-pytorch."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """Up-sample (nearest) to the next size, concatenate the skipped map if there is one, then two convolutions."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(c_in + c_skip, c_out)
        self.conv2 = conv_norm_relu(c_out, c_out)

    def forward(self, x: Tensor, size: torch.Size, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, size=size, mode="nearest")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class Decoder2d(nn.Module):
    """Five up-sampling blocks from the deepest feature map to the input's size. They begin as the library's and the
    published decoders: convolutions from He's uniform distribution.

    Args:
        encoder_channels: `encoder.out_channels`, shallow to deep.
        channels: of each level, deep to shallow.
        skips: whether the levels see the encoder's maps; the last one, of the image's size, never does.
    """

    def __init__(
        self, encoder_channels: Sequence[int], channels: Sequence[int] = DECODER_CHANNELS, skips: bool = False
    ) -> None:
        super().__init__()
        self.skips = skips
        c_in = [encoder_channels[-1], *channels[:-1]]
        c_skip = [c * skips for c in encoder_channels[-2:0:-1]] + [0]
        self.blocks = nn.ModuleList(DecoderBlock(*some) for some in zip(c_in, c_skip, channels))
        initialize_decoder(self)

    def forward(self, features: Sequence[Tensor], depth: int | None = None) -> list[Tensor]:
        """Decode.

        Args:
            features: the encoder's maps, shallow to deep; each level takes the size of the map it mirrors,
                so inputs whose side is no multiple of 32 come back at their own size.
            depth: compute the first `depth` levels only; all by default.

        Returns:
            The maps of the computed levels, deep to shallow: level i is (B, channels[i], H/2^(4-i), W/2^(4-i)).
        """
        *mirrored, image = features[-2::-1]
        skips = [*(mirrored if self.skips else [None] * len(mirrored)), None]
        x, levels = features[-1], []
        for block, target, skip in list(zip(self.blocks, [*mirrored, image], skips))[:depth]:
            x = block(x, target.shape[2:], skip)
            levels.append(x)
        return levels


def make_output(channels: int) -> nn.Conv2d:
    """The 3×3 convolution from a decoder's last level to the output; it begins as the library's and the published
    ones: from Glorot's uniform distribution, without bias."""
    output = nn.Conv2d(DECODER_CHANNELS[-1], channels, 3, padding=1)
    initialize_head(output)
    return output


class UNet2d(nn.Module):
    """Encoder, decoder, and a 3×3 convolution to the output; all of an image's size.

    Args:
        arch: encoder name.
        outputs: channels of the output.
        skips: whether the decoder sees the encoder's maps.
    """

    def __init__(self, arch: str, outputs: int, skips: bool = True) -> None:
        super().__init__()
        self.encoder = make_encoder(arch)
        self.decoder = Decoder2d(self.encoder.out_channels, skips=skips)
        self.output = make_output(outputs)

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """The encoder's maps, shallow to deep, of which the first is the image → (B, outputs, H, W)."""
        return self.output(self.decoder(maps)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, outputs, H, W), float32, before any sigmoid or softmax."""
        return self.decode(self.encoder(x)).float()
