"""Losses between masks: values by hand, any number of axes, gradients."""

import math

import pytest
import torch

from medssl.losses.segmentation import dice_cross_entropy, soft_dice


@pytest.mark.parametrize("shape", [(4,), (2, 2), (2, 2, 1)])
def test_soft_dice_by_hand(shape):
    p = torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(1, 2, *shape)
    truth = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).view(1, 2, *shape)
    # 2 · 1.5 / (2 + 2); a label that neither has is right.
    assert soft_dice(p, truth, smooth=1e-5).tolist() == [[pytest.approx(0.75, abs=1e-5), 1.0]]
    assert soft_dice(p, truth, smooth=4.0)[0, 0].item() == pytest.approx(7 / 8)


@pytest.mark.parametrize("shape", [(4,), (2, 2), (2, 1, 2)])
def test_dice_and_cross_entropy_by_hand(shape):
    # Probabilities of labels 0, 1, 2: (.5, .25, .25) everywhere; the truth is 0, 1, 1, 2.
    logits = torch.tensor([0.5, 0.25, 0.25]).log().view(1, 3, 1).repeat(1, 1, 4).view(1, 3, *shape)
    target = torch.tensor([0, 1, 1, 2]).view(1, *shape)
    losses = dice_cross_entropy(logits, target)
    assert losses["cross_entropy"].item() == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)
    first, second = 2 * 0.5 / (1 + 2), 2 * 0.25 / (1 + 1)  # the background does not count
    assert losses["dice"].item() == pytest.approx(1 - (first + second) / 2, abs=1e-5)


def test_a_batch_is_the_mean_of_its_images():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 6, 5, 4), torch.randint(3, (4, 6, 5, 4))
    whole = dice_cross_entropy(logits, target)
    halves = [dice_cross_entropy(a, b) for a, b in zip(logits.chunk(2), target.chunk(2))]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(half[name].item() for half in halves) / 2, rel=1e-5)


def test_half_precision_keeps_the_sums_of_large_volumes():
    logits = torch.zeros(1, 2, 64, 64, 32, dtype=torch.float16)  # 131072 voxels; float16 ends at 65504
    logits[:, 1] = 8
    with torch.autocast("cpu", torch.bfloat16):
        losses = dice_cross_entropy(logits, torch.ones(1, 64, 64, 32, dtype=torch.long))
    assert losses["dice"].dtype == torch.float32
    assert losses["dice"].item() == pytest.approx(1 - 2 * 0.99966 / 1.99966, abs=1e-4)


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 2, dtype=torch.double, requires_grad=True)
    truth = torch.nn.functional.one_hot(torch.randint(3, (2, 2, 2)), 3).movedim(-1, 1)
    assert torch.autograd.gradcheck(lambda x: soft_dice(x.softmax(1), truth), logits)
    target = torch.tensor([[[0, 1], [2, 1]]])
    start = torch.zeros(1, 3, 2, 2, requires_grad=True)
    sum(dice_cross_entropy(start, target).values()).backward()
    pulled = start.grad.argmin(1)  # the descent direction of every voxel is its own label
    assert torch.equal(pulled, target)
