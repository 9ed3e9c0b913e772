"""Concepts of an image: regions whose features are alike, found without labels, and one embedding for each
(ConCL, Yang et al., ECCV 2022, arXiv 2207.06733, §3). Everything is batched over images and concepts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.engine.parallel import Run


def random_pixels(run: Run, images: int, pixels: int, clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The pixels at which `cosine_kmeans` starts, (B, K), all different where an image has enough, and those that empty
    clusters take, (iterations, B, K); int64 on the CPU."""
    seeds = run.uniform(images, max(pixels, clusters)).argsort(1)[:, :clusters] % pixels
    spare = (run.uniform(images, iterations * clusters) * pixels).long().clamp(max=pixels - 1)
    return seeds, spare.view(images, iterations, clusters).transpose(0, 1)


@torch.no_grad()
def cosine_kmeans(x: Tensor, seeds: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Spherical k-means of each image's pixels (paper, §3.3).

    Args:
        x: (B, N, C) features of N pixels, of any length.
        seeds: (B, K) int64 pixels that are the first centroids.
        spare: (iterations, B, K) int64 pixels that a cluster takes as its centroid where it is empty.

    Returns:
        the cluster of each pixel, (B, N) int64, and the centroids, (B, K, C), means of normalised features.
    """
    with torch.autocast(x.device.type, enabled=False):  # whose products would move pixels between near clusters
        return _cosine_kmeans(F.normalize(x.float(), dim=2), seeds, spare)


def _cosine_kmeans(x: Tensor, seeds: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """`cosine_kmeans` of features of unit length."""
    b, _, c = x.shape
    k = seeds.shape[1]
    first = k * torch.arange(b, device=x.device)[:, None]  # of each image's clusters among those of all

    def pixels(index: Tensor) -> Tensor:
        return x.gather(1, index.to(x.device)[..., None].expand(b, k, c))

    centroids = pixels(seeds)
    for fallback in spare:
        clusters = (F.normalize(centroids, dim=2) @ x.transpose(1, 2)).max(1).indices  # faster than argmax
        places = (first + clusters).flatten()
        # A pixel is in one cluster: adding rows costs half of a product with the clusters' masks.
        sums = x.new_zeros(b * k, c).index_add_(0, places, x.flatten(0, 1)).view(b, k, c)
        count = F.one_hot(clusters, k).sum(1)[..., None]
        centroids = sums
        # Whether any is empty is known at once on a CPU; on a GPU one would have to wait for it.
        if x.is_cuda or not bool(count.all()):
            centroids = torch.where(count > 0, sums, pixels(fallback))
    return clusters, centroids / count.clamp(min=1)


def bin_weights(start: Tensor, end: Tensor, length: int, bins: int) -> Tensor:
    """Averages over the bins of an interval, as adaptive average pooling divides it.

    Args:
        start, end: (B,) int64 first cell and that after the last, 0 ≤ start < end ≤ length.

    Returns:
        (B, bins, length) float32, rows that sum to 1.
    """
    i = torch.arange(bins, device=start.device)
    n = (end - start)[:, None]
    first, last = start[:, None] + i * n // bins, start[:, None] - (-(i + 1) * n // bins)
    cell = torch.arange(length, device=start.device)
    inside = (first[..., None] <= cell) & (cell < last[..., None])
    return inside / (last - first)[..., None]


@torch.no_grad()
def view_maps(clusters: Tensor, boxes: Tensor, concepts: int, side: int) -> Tensor:
    """The reference view's concepts, as a crop of it sees them.

    Args:
        clusters: (B, H, W) int64 concepts of the reference view.
        boxes: (B, 5) float: top, left, bottom, right of the crop, shares of the reference view, and whether it is
            mirrored left to right (above 0).
        concepts: K.
        side: of the crop's map; each cell has the concept of most of what it covers.

    Returns:
        (B, side, side) int64.
    """
    _, height, width = clusters.shape
    boxes = boxes.to(clusters.device)
    one_hot = F.one_hot(clusters, concepts).to(torch.float32)  # (B, H, W, K)

    def weights(low: Tensor, high: Tensor, length: int) -> Tensor:
        start = (low * length).round().long().clamp(0, length - 1)
        end = torch.maximum((high * length).round().long().clamp(max=length), start + 1)
        return bin_weights(start, end, length, side)

    rows, columns = weights(boxes[:, 0], boxes[:, 2], height), weights(boxes[:, 1], boxes[:, 3], width)
    shares = torch.einsum("bih,bhwk,bjw->bijk", rows, one_hot, columns)
    # Shares are sums in another order than a plain average's: equal ones must stay equal, for the first to win.
    seen = shares.mul(1e4).round().argmax(3)
    return torch.where(boxes[:, 4, None, None] > 0, seen.flip(2), seen)


def concept_means(maps: Tensor, concepts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each concept.

    Args:
        maps: (B, C, h, w). concepts: (B, h, w) int64 below `count`.

    Returns:
        (B, K, C) float32, 0 for a concept that is not there, and whether it is, (B, K) bool.
    """
    inside = F.one_hot(concepts.flatten(1), count).to(torch.float32).transpose(1, 2)  # (B, K, h·w)
    cells = inside.sum(2, keepdim=True)
    with torch.autocast(maps.device.type, enabled=False):
        means = inside @ maps.float().flatten(2).transpose(1, 2) / cells.clamp(min=1)
    return means, cells[..., 0] > 0
