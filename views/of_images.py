"""What methods and tasks see of images: batches of textures become views, on the training device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import masks_to_boxes

from medssl.views.draws import Columns, Draws, seeds_of, view_major
from medssl.views.ops import GenesisChanges, add_transforms, visible_patches
from medssl.views.ops2d import (
    Pyramid,
    affine,
    box_around,
    change_tones,
    color_jitter,
    cutout,
    mask_cells,
    normalise,
    pyramid_levels,
    random_blur,
    random_gray,
    random_resized_crop,
    sample,
    solarise,
)

CPU_PART = 4  # images whose views are made at a time on a CPU


class Views(nn.Module):
    """Base of all views: what a batch of textures becomes before the method sees it.

    `forward(batch, draws)` takes {"image" (B, C, S, S) uint8, "size" (B, 2) original height and width, on the
    CPU, …} and returns the method's batch. `mean` and `std` are the normalisation of each channel, `patches` how many
    views of an image go through the network together.
    """

    patches = 1

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def normalise(self, x: Tensor) -> Tensor:
        return normalise(x, self.mean, self.std)

    def random_crops(
        self, size: Tensor, draws: Columns, count: int, scale: tuple[float, float], degrees: float
    ) -> Tensor:
        """Maps (B, V, 2, 3) of `count` views: random resized crop, rotation up to ±`degrees`, left–right flip.

        `size` (B, 2) is the images' original height and width. 24 columns per view are taken. Rotation brings in
        what lies beside the crop.
        """
        thetas = [torch.empty(len(size), 0, 2, 3)]
        for _ in range(count):
            box = random_resized_crop(draws, size, scale)
            angle = draws.take(1, -degrees, degrees)[:, 0]
            flip = draws.take(1)[:, 0] < 0.5
            thetas.append(affine(box, angle if degrees else None, flip)[:, None])
        return torch.cat(thetas, 1)


class MultiCropViews(Views):
    """Random crops of an image, with colours changed: one or several large ones and, for PCRLv2, small ones
    (arXiv 2301.00772, §4.1). The defaults are PCRLv2's.

    Args:
        size, local_size: sides of large and local views in pixels.
        views: number of large views n.
        locals_: number of local views V.
        targets: of how many large views the state before their colours changed is wanted.
        scale, local_scale: area shares of the crops.
        degrees: largest rotation.
        gray, blur: chances that a view turns grey, is blurred; blur's may differ between large views (n numbers).
        solarised: chance of each large view to be solarised; of none by default.
        jitter_first: jitter before grey and blur, as MoCo and its followers do; PCRL and PCRLv2 do so afterwards.
        jitter: brightness, contrast, saturation, hue of the colour jitter, which has the chance `jitter_chance`.
        blur_sigma: range of the blur's standard deviation in pixels.
        hole: side of each of the three cutout holes in pixels.

    Returns, from `forward`:
        {"view1" … "view{n}" (B, 3, size, size), "locals" (V·B, 3, local_size, local_size), view-major, "target" and
        "target2" (B, 3, size, size): the first views before their colours were changed}, all normalised; "index" (B,)
        image numbers.

    Random columns of an image, by stream of `Draws`:
        0: 24 for each large view, 24 for each local view, as `random_crops` takes them;
        1: 18 for each large view: 12 as `color` takes them, 6 for the holes;
        2: 12 for each local view, as `color` takes them;
        4: where views are solarised, 1 for each large view.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        local_size: int = 96,
        views: int = 2,
        locals_: int = 6,
        targets: int = 1,
        scale: tuple[float, float] = (0.3, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.3),
        degrees: float = 10.0,
        gray: float = 0.2,
        blur: float | Sequence[float] = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4),
        jitter_chance: float = 1.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        hole: int = 32,
        solarised: Sequence[float] = (),
        jitter_first: bool = False,
    ) -> None:
        super().__init__(mean, std)
        self.solarised, self.jitter_first = tuple(solarised), jitter_first
        self.size, self.local_size, self.views, self.locals_ = size, local_size, views, locals_
        self.targets, self.scale, self.local_scale, self.degrees = targets, scale, local_scale, degrees
        self.gray, self.blur, self.jitter, self.jitter_chance = gray, blur, jitter, jitter_chance
        self.blur_sigma, self.hole = blur_sigma, hole

    def color(self, x: Tensor, draws: Columns) -> Tensor:
        """Grey, blur, colour jitter. 12 columns."""
        blur = self.blur
        if isinstance(blur, Sequence):
            blur = torch.tensor(blur).repeat_interleave(len(x) // self.views)  # rows are view-major
        if self.jitter_first:
            x = color_jitter(x, draws, *self.jitter, p=self.jitter_chance)
        x = random_gray(x, draws, self.gray)
        x = random_blur(x, draws, blur, self.blur_sigma)
        return x if self.jitter_first else color_jitter(x, draws, *self.jitter, p=self.jitter_chance)

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        b, n, v = len(batch["image"]), self.views, self.locals_
        numbers = [draws.uniform(0, 24 * (n + v)), draws.uniform(1, 18 * n), draws.uniform(2, 12 * v)]
        rows = [batch["image"], batch["size"], *numbers]
        # On a CPU few images at a time: what is computed in between then stays in the processor's cache.
        part = CPU_PART if batch["image"].device.type == "cpu" else b
        parts = [self.crop_and_color(*some) for some in zip(*(whole.split(part) for whole in rows))]
        # (V, B, C, h, w) → (V·B, C, h, w), view-major
        targets, large, small = (torch.cat(views, 1).flatten(0, 1) for views in zip(*parts))
        if self.solarised:
            chances = torch.tensor(self.solarised).repeat_interleave(b)
            large = solarise(large, view_major(draws.uniform(4, n), n), chances)
        views = self.normalise(large)
        if self.hole:
            columns = view_major(numbers[1], n)
            columns.take(12)  # for the colours
            views = cutout(views, columns, 3, self.hole)
        out = {f"view{i}": view for i, view in enumerate(views.split(b), 1)}
        if self.targets:
            out |= zip(("target", "target2"), self.normalise(targets).split(b))
        if v:
            out["locals"] = self.normalise(small)
        if "index" in batch:
            out["index"] = batch["index"]
        return out

    def crop_and_color(
        self, images: Tensor, size: Tensor, spatial: Tensor, color: Tensor, local_color: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All views of b images, not yet normalised, from rows of uniform numbers.

        Returns:
            the first views before their colours changed (targets, b, C, size, size), the large views
            (n, b, C, size, size), and the local views (V, b, C, local_size, local_size).
        """
        columns, side = Columns(spatial), images.shape[-1]
        large = self.random_crops(size, columns, self.views, self.scale, self.degrees)
        small = self.random_crops(size, columns, self.locals_, self.local_scale, self.degrees)
        # Large and small views read from one pyramid.
        plans = [(large.flatten(0, 1), self.size), (small.flatten(0, 1), self.local_size)]
        levels = torch.cat([pyramid_levels(theta, side, out) for theta, out in plans])
        pyramid = Pyramid(images, int(levels.min()), int(levels.max()))

        def cut(theta: Tensor, out: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
            b, count = theta.shape[:2]
            views = sample(pyramid, theta, out, black_outside=self.degrees > 0)
            numbers = numbers.view(b, count, -1).transpose(0, 1).flatten(0, 1)
            return tuple(x.unflatten(0, (count, b)) for x in (views, self.color(views, Columns(numbers))))

        before, after = cut(large, self.size, color)
        locals_ = cut(small, self.local_size, local_color)[1] if self.locals_ else after[:0]
        return before[: self.targets], after, locals_


class RestorationViews(MultiCropViews):
    """PCRL's 2D views (arXiv 2109.04379, §4.1): two crops, their clean states, and both transformed by a code.

    Returns, from `forward`: what `MultiCropViews` does, and what `add_transforms` adds.
    Stream 3 of `Draws` has 3 columns for each view.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **options: object) -> None:
        super().__init__(mean, std, locals_=0, targets=2, **options)

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        return add_transforms(super().forward(batch, draws), view_major(draws.uniform(3, 2 * 3), 2), axes=2)


class PairViews(MultiCropViews):
    """Two crops, eight of ten jittered before they turn grey and are blurred, not rotated: the views of MoCo's second
    version, SimCLR, BYOL and their followers."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], **options: object) -> None:
        own = {"degrees": 0.0, "hole": 0, "locals_": 0, "targets": 0, "jitter_chance": 0.8, "jitter_first": True}
        super().__init__(mean, std, **{**own, **options})


class WholeOrCropViews(PairViews):
    """`PairViews` in training; in evaluation {"whole" (B, 3, size, size)}, the whole image, normalised."""

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        if self.training:
            return super().forward(batch, draws)
        whole = torch.eye(2, 3).expand(len(batch["image"]), 1, 2, 3)
        return {"whole": self.normalise(sample(batch["image"], whole, self.size).clamp_(0, 1))}


class ConceptViews(PairViews):
    """ConCL's views (arXiv 2207.06733, §3.2): two crops, and the reference view, the smallest box around both, whose
    colours stay.

    Returns, from `forward`: what `MultiCropViews` does, "reference" (B, 3, size, size) normalised, and "box1", "box2"
    (B, 5) on the CPU: the crop's top, left, bottom and right, shares of the reference view, and 1 where the crop is
    mirrored left to right.
    """

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        out = super().forward(batch, draws)
        crops = self.random_crops(batch["size"], Columns(draws.uniform(0, 24 * 2)), 2, self.scale, 0.0)  # the same
        whole, boxes = box_around(crops)
        out["reference"] = self.normalise(sample(batch["image"], whole[:, None], self.size).clamp_(0, 1))
        return out | {f"box{i}": box for i, box in enumerate(boxes.unbind(1), 1)}


class MaskedToneViews(Views):
    """MAGICAL's views: the whole image, and the same with its tones changed and parts blacked out; or two crops, of
    which the second is changed.

    Args:
        size: side of the views in pixels.
        crop_scale: least area share of a crop in training; none unless given, as published.
        mask: what is blacked out, "cells" or "stripes", which are rows. mask_ratio: share of it. grid: cells along a
            side.
        channels: of the target; those of the images by default, three equal ones of grey images if asked.

    Returns, from `forward`:
        {"image", "changed" (B, 3, size, size) normalised; "target" (B, C, size, size) what was changed, in [0, 1];
        "index" (B,) image numbers}.

    Random columns of an image: stream 0 of `Draws` has 2 for the tones, stream 1 grid² for the cells, or size for the
    stripes, stream 2 has 48 for the crops.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        mask_ratio: float = 0.25,
        grid: int = 32,
        mask: str = "cells",
        channels: int | None = None,
        crop_scale: float | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.size, self.mask, self.mask_ratio, self.grid, self.channels = size, mask, mask_ratio, grid, channels
        self.crop_scale = crop_scale

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        theta = torch.eye(2, 3).expand(len(batch["image"]), 1, 2, 3)
        if self.crop_scale and self.training:
            columns = Columns(draws.uniform(2, 2 * 24))
            theta = self.random_crops(batch["size"], columns, 2, (self.crop_scale, 1.0), 0.0)
        views = sample(batch["image"], theta, self.size).clamp_(0, 1)
        x, before = views[: len(theta)], views[-len(theta) :]  # the same where nothing is cropped
        changed = change_tones(before, Columns(draws.uniform(0, 2)))
        rows, columns = (self.size, 1) if self.mask == "stripes" else (self.grid, self.grid)
        changed = mask_cells(changed, Columns(draws.uniform(1, rows * columns)), self.mask_ratio, rows, columns)
        target = before.expand(-1, self.channels or -1, -1, -1)
        out = {"image": self.normalise(x), "changed": self.normalise(changed), "target": target}
        return out | ({"index": batch["index"]} if "index" in batch else {})


class GenesisViews(Views):
    """Models Genesis' 2D views (arXiv 1908.06912, §3): a crop, and the same changed.

    Args:
        size: side of the views in pixels.
        scale: area share of the crop, which is mirrored left to right with chance ½, not turned.
        changes: what is changed of it; the published changes unless given.

    Returns, from `forward`:
        {"changed" (B, 3, size, size) normalised; "target" (B, C, size, size) the crop in [0, 1]}.

    Random columns of an image: stream 0 of `Draws` has 24 for the crop, stream 1 those of `changes`; streams 2 and 3
    have its seeds.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        changes: GenesisChanges | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.size, self.scale, self.changes = size, scale, changes or GenesisChanges()

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        theta = self.random_crops(batch["size"], Columns(draws.uniform(0, 24)), 1, self.scale, 0.0)
        target = sample(batch["image"], theta, self.size).clamp_(0, 1)
        columns = Columns(draws.uniform(1, self.changes.columns(2)))
        changed = self.changes(target, columns, [seeds_of(draws, stream) for stream in (2, 3)])
        return {"changed": self.normalise(changed), "target": target}


class HiddenPatchViews(Views):
    """Masked autoencoding's views: a crop, mirrored left to right with chance ½, and which of its patches are seen.

    Args:
        size: side of the view in pixels. patch: that of a patch, which divides it.
        mask_ratio: share of the patches that is hidden.
        scale: area shares of the crops, SparK's (arXiv 2301.03580, published code).

    Returns, from `forward`:
        {"image" (B, 3, size, size) normalised, "visible" (B, 1, size/patch, size/patch) bool}.

    Random columns of an image: stream 0 of `Draws` has 24, as `random_crops` takes them, stream 1 one for each patch.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        patch: int = 32,
        mask_ratio: float = 0.6,
        scale: tuple[float, float] = (0.67, 1.0),
    ) -> None:
        super().__init__(mean, std)
        self.size, self.grid, self.mask_ratio, self.scale = size, (size // patch,) * 2, mask_ratio, scale

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        crops = self.random_crops(batch["size"], Columns(draws.uniform(0, 24)), 1, self.scale, 0.0)
        x = self.normalise(sample(batch["image"], crops, self.size).clamp_(0, 1))
        visible = visible_patches(Columns(draws.uniform(1, math.prod(self.grid))), self.grid, self.mask_ratio)
        return {"image": x, "visible": visible.to(x.device, non_blocking=True)}


class SegmentationViews(Views):
    """One view an image and its masks, for training; the whole image in evaluation.

    Args:
        size: side in pixels to which whole images are resized.
        patch: side of the part that training cuts out of the resized image; all of it by default.
        zoom: range of the part's side over `patch` pixels; of a part that would be larger than the image, the image.
        degrees: largest rotation. flips: mirrored left–right, upside down, each with chance ½.
        jitter: strengths of brightness and contrast.
        augment: False for the view of evaluation, the whole image, in training too.

    `forward` takes the items of `MaskedImages` and gives "view" (B, 3, P, P), normalised, "target" (B, K, P, P) and
    "field" (B, 1, P, P), float 0 or 1: random in training mode, the whole image (P = size) in evaluation mode.
    Parts beside the image are black, and not in the field. Stream 0 of `Draws` has 6 columns, stream 1 has 9.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 512,
        patch: int | None = None,
        zoom: tuple[float, float] = (0.8, 1.25),
        degrees: float = 10.0,
        flips: tuple[bool, bool] = (True, False),
        jitter: tuple[float, float] = (0.2, 0.2),
        augment: bool = True,
    ) -> None:
        super().__init__(mean, std)
        self.size, self.patch, self.zoom, self.augment = size, patch or size, zoom, augment
        self.degrees, self.flips, self.jitter = degrees, flips, jitter

    def random_parts(self, count: int, draws: Columns) -> Tensor:
        """Maps (N, 2, 3) of `count` parts. 6 columns are taken."""
        half = (draws.take(1, *self.zoom) * self.patch / self.size).clamp(max=1)
        centre = draws.take(2, -1, 1) * (1 - half)
        angle = draws.take(1, -self.degrees, self.degrees)[:, 0]
        mirrored = (draws.take(2) < 0.5) & torch.tensor(self.flips)
        theta = affine(torch.cat([centre, half, half], 1), angle if self.degrees else None, mirrored[:, 0])
        theta[:, :, 1] *= 1 - 2 * mirrored[:, 1:].float()
        return theta

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        b = len(batch["image"])
        change = self.training and self.augment
        if change:
            theta = self.random_parts(b, Columns(draws.uniform(0, 6)))[:, None]
            side = self.patch
        else:
            theta, side = torch.eye(2, 3).expand(b, 1, 2, 3), self.size
        x = sample(batch["image"], theta, side, black_outside=True)
        if change:
            x = color_jitter(x, Columns(draws.uniform(1, 9)), *self.jitter, 0, 0)
        masks = torch.cat([batch["mask"], batch["field"]], 1)
        inside = (sample(masks, theta, side, black_outside=True) > 0.5).float()
        return {**batch, "view": self.normalise(x), "target": inside[:, :-1], "field": inside[:, -1:]}


class DetectionViews(Views):
    """Images at their own size, for networks that resize them: in training mirrored left to right with chance ½.

    `forward` takes the items of `InstanceImages` whose `detected` is true, and gives "images", tensors (3, H, W) in
    [0, 1], and "targets", dicts with "boxes" (N, 4) left, top, right, bottom in pixels, "labels" (N,), all 1, and
    "masks" (N, H, W) uint8. Stream 0 of `Draws` has 1 column.
    """

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, list]:
        images, targets = [], []
        flips = draws.uniform(0, 1)[:, 0] < 0.5 if self.training else torch.zeros(len(batch["image"])).bool()
        for image, instances, flip in zip(batch["image"], batch["instances"], flips):
            if flip:
                image, instances = image.flip(2), instances.flip(1)
            images.append(image.float() / 255)
            targets.append(instance_targets(instances))
        return {"images": images, "targets": targets}


def instance_targets(instances: Tensor) -> dict[str, Tensor]:
    """(H, W) integers, 0 or the instance's number → "boxes", "labels", "masks" as `DetectionViews` gives them."""
    numbers = instances.unique()
    masks = instances == numbers[numbers > 0][:, None, None]  # (N, H, W)
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # it gives the last pixels, not where they end
    return {"boxes": boxes, "labels": boxes.new_ones(len(boxes), dtype=torch.int64), "masks": masks.to(torch.uint8)}


class ClassificationViews(Views):
    """One view an image for supervised training; centre views for evaluation.

    Args:
        size: side of the view in pixels.
        scale: area share of the random crop, degrees: largest rotation, flip: left–right, chance ½.
        margin: evaluation takes the centre square of this share of the shorter side (224/256 in the published
            protocol).
        augment: False for the view of evaluation in training too.

    `forward` adds "view" (B, 3, size, size), normalised, to the batch: random in training mode, centred in
    evaluation mode. `ten_crops` gives the four corners and the centre, and their mirror images.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        degrees: float = 10.0,
        margin: float = 224 / 256,
        augment: bool = True,
    ) -> None:
        super().__init__(mean, std)
        self.size, self.scale, self.degrees, self.margin, self.augment = size, scale, degrees, margin, augment

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        if self.training and self.augment:
            columns = Columns(draws.uniform(0, 24))
            theta = self.random_crops(batch["size"], columns, 1, self.scale, self.degrees)
            view = sample(batch["image"], theta, self.size, black_outside=self.degrees > 0)
        else:
            box = self._box(batch, torch.zeros(2))
            view = sample(batch["image"], affine(box)[:, None], self.size)
        return {**batch, "view": self.normalise(view)}

    def ten_crops(self, batch: dict) -> Tensor:
        """(10·B, 3, size, size) normalised, crop-major."""
        places = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1], [0, 0]])
        thetas = [
            affine(self._box(batch, place), flip=torch.full((len(batch["size"]),), flip))
            for flip in (False, True)
            for place in places
        ]
        return self.normalise(sample(batch["image"], torch.stack(thetas, 1), self.size))

    def _box(self, batch: dict, place: Tensor) -> Tensor:
        """(B, 4) boxes of the evaluation square at `place`, from −1 (left, top) to 1 in the resized image."""
        short = batch["size"].amin(1, keepdim=True)
        half = (short / batch["size"]).flip(1) * self.margin  # (B, 2) half width and height
        return torch.cat([place * (1 - half), half], 1)
