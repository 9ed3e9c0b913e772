"""Mask R-CNN (arXiv 1703.06870) with a feature pyramid on our 2D encoders: torchvision's, around another backbone."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

STRIDES = (4, 8, 16, 32)  # of the encoder's last four maps
PYRAMID = 256  # channels


class PyramidBackbone(nn.Module):
    """An encoder and a feature pyramid on its last four maps (arXiv 1612.03144), batch norms after its convolutions.

    Args:
        encoder: `encoder(x)` lists maps, shallow to deep, with `encoder.out_channels`.
    """

    out_channels = PYRAMID

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        channels = list(encoder.out_channels[-len(STRIDES) :])
        self.pyramid = FeaturePyramidNetwork(channels, PYRAMID, LastLevelMaxPool(), nn.BatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → maps by name, "0" at stride 4 to "3" at stride 32, and "pool"."""
        return self.pyramid({str(i): m for i, m in enumerate(self.encoder(x)[-len(STRIDES) :])})


def make_detector(
    encoder: nn.Module,
    normalization: dict,
    classes: int,
    sides: Sequence[int],
    test_side: int,
    longest: int,
    proposals: int = 1000,
    samples: int = 512,
) -> MaskRCNN:
    """Mask R-CNN for images in [0, 1] of any size.

    Args:
        normalization: "mean" and "std" that the encoder's inputs have.
        classes: number of them, without the background.
        sides: shorter sides to which training resizes, one drawn for each image, pixels.
        test_side: the shorter side in evaluation. longest: the longer side's limit.
        proposals: regions of an image that reach the heads, in training `samples` drawn of them; each level of the
            pyramid proposes as many in evaluation and twice as many in training (detectron2's Base-RCNN-FPN).
    """
    network = MaskRCNN(
        PyramidBackbone(encoder), classes + 1, min_size=tuple(sides), max_size=longest,
        image_mean=normalization["mean"], image_std=normalization["std"],
        rpn_pre_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_train=proposals,
        rpn_pre_nms_top_n_test=proposals, rpn_post_nms_top_n_test=proposals, box_batch_size_per_image=samples,
    )  # fmt: skip
    # In evaluation torchvision takes the last of the sides.
    network.transform.min_size = (*sides, test_side)
    draw = network.transform.torch_choice
    network.transform.torch_choice = lambda _: draw(list(sides))
    # torchvision guesses the maps' strides from the first images that it sees, wrongly where these are small, and
    # does not keep them in the state: a continued run would guess anew.
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        pool.scales = [1 / stride for stride in STRIDES]
        low, high = (int(math.log2(stride)) for stride in (STRIDES[0], STRIDES[-1]))
        pool.map_levels = initLevelMapper(low, high, pool.canonical_scale, pool.canonical_level)
    return network
