"""What methods and tasks see of volumes, as `of_images` for images."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.errors import InputError
from medssl.views.draws import Columns, Draws, seeds_of, view_major
from medssl.views.of_images import Views
from medssl.views.ops import GenesisChanges, add_transforms, local_shuffling, painting, visible_patches
from medssl.views.ops3d import (
    CANDIDATES,
    CUBE_SIZE,
    GLOBAL_SIZES,
    LOCAL_CUBE_SIZE,
    LOCAL_SIZES,
    MIN_IOU,
    PCRL_MIN_IOU,
    PCRL_SIZES,
    Shape,
    Size,
    add_noise_,
    blur,
    crop_resize,
    gamma_,
    random_affine,
    random_boxes,
    resize,
    sample,
    swap_patches,
    windows,
    z_normalise,
)

HIDDEN_SIDE = 8  # voxels of a hidden patch's sides: the encoder's stride


class VolumeViews(Views):
    """Base of the views of volumes, which are normalised one by one.

    `forward(batch, draws)` takes {"image": (B, C, X, Y, Z) float16 or float32 in [0, 1], or a list of B volumes
    (C, X, Y, Z) of any shapes; "size": (B, 3) extents in mm, on the CPU; …}.

    Args:
        kind: "z", to zero mean and unit deviation, or "unit", left in [0, 1].
    """

    def __init__(self, kind: str = "z") -> None:
        super().__init__((), ())  # no constants: each view has a mean and deviation of its own
        self.kind = kind

    def normalise(self, x: Tensor) -> Tensor:
        return z_normalise(x) if self.kind == "z" else x


class CutCubes(VolumeViews):
    """Base of views that are two overlapping large cubes and several small ones around them.

    The batch has prepared cubes, "image" (B, 2, X, Y, Z) and "locals" (B, V, x, y, z), or whole volumes, "image"
    (B, 1, X, Y, Z) with "size", out of which cubes are cut here. Cubes of another shape than asked for are resized.

    Args:
        size, local_size: shapes of large and small views in voxels.
        locals_: number of small views V; prepared cubes may have more.
        crops: sizes in mm of the large cubes cut out of whole volumes, in proportion out of small ones. min_iou: by how
            much they overlap.
        kind: of normalisation.
        crop_mm: exact sizes instead of `crops`; small cubes then have the large ones' mm a voxel.
    """

    def __init__(
        self, size: Shape, local_size: Shape, locals_: int, crops: Sequence[Size], min_iou: float, kind: str,
        crop_mm: Sequence[Size] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kind)
        self.size, self.local_size, self.locals_ = tuple(size), tuple(local_size), locals_
        self.exact, self.min_iou = bool(crop_mm), min_iou
        self.crops, self.smalls = crop_mm or crops, LOCAL_SIZES
        if crop_mm:
            shares = [small / large for small, large in zip(self.local_size, self.size)]
            self.smalls = [tuple(mm * share for mm, share in zip(crop, shares)) for crop in crop_mm]

    def cut(self, batch: dict, draws: Draws, second: Tensor | None = None) -> list[Tensor]:
        """Large cubes (2·B, 1, *size), and small ones (V·B, 1, *local_size) where V > 0, view-major, in [0, 1]. With
        `second`, (B,) bool on the CPU, one large cube of each volume, (B, 1, *size): the second where it is 1."""
        image, v = batch["image"], self.locals_
        large = 2 if second is None else 1
        if image[0].shape[0] == 2:
            pairs = image if second is None else image[torch.arange(len(image)), second.long()][:, None]
            stored = [pairs] if v == 0 else [pairs, batch.get("locals")]
            if v and (stored[1] is None or stored[1].shape[1] < v):
                found = 0 if stored[1] is None else stored[1].shape[1]
                raise InputError(
                    f"--local-views {v}: the prepared cubes have {found}; ask for no more, or prepare anew"
                )
            cubes = []
            for stack, count, shape in zip(stored, (large, v), (self.size, self.local_size)):
                stack = stack[:, :count].transpose(0, 1).float().flatten(0, 1)  # (count·B, x, y, z)
                cubes.append(stack[:, None] if stack.shape[1:] == shape else resize(list(stack), shape))
            return cubes
        volumes = [volume[0] for volume in image]
        voxels = torch.tensor([volume.shape for volume in volumes])
        numbers = Columns(draws.uniform(0, 8 * CANDIDATES + 4 * v))
        pairs, small = random_boxes(
            numbers, batch["size"].cpu(), voxels, v, self.crops, self.min_iou, self.smalls, self.exact
        )
        if second is not None:
            pairs = pairs[torch.arange(len(pairs)), second.long()][:, None]
        return [
            # One view after the other: the windows of all would be large.
            torch.cat([crop_resize(volumes, each, shape) for each in some.unbind(1)])
            for some, shape in ((pairs, self.size), (small, self.local_size))
            if some.shape[1]
        ]

    def cut_one(self, batch: dict, draws: Draws, columns: Columns, flips: Sequence[int]) -> Tensor:
        """One of each volume's two large cubes, drawn, and mirrored along the axes `flips` with chance ½ each:
        (B, 1, *size) in [0, 1]. Takes 4 columns."""
        choices = columns.take(4) < 0.5
        (cube,) = self.cut(batch, draws, ~choices[:, 0])
        mirrored = choices.to(cube.device, non_blocking=True).view(-1, 4, 1, 1, 1, 1)
        for axis in flips:
            cube = torch.where(mirrored[:, 1 + axis], cube.flip(2 + axis), cube)
        return cube


class CubeViews(CutCubes):
    """PCRLv2's 3D views: two large cubes and several small ones (arXiv 2301.00772, §4.1), as `CutCubes` reads them.

    Args:
        flips: axes mirrored with chance ½.
        scale, degrees: ranges of the affine map, in the cubes' voxels.
        blur: largest deviation of the blur in voxels.
        noise: largest deviation of the noise.
        log_gamma: largest logarithm of the gamma curve's exponent.
        swaps: exchanges of 8 × 4 × 4 patches in large views of 64 × 64 × 32 voxels, as published; as many per voxel
            in others, which so many would leave nothing of.
        crop_mm: as for `CutCubes`.
        mask_ratio: share of the large views' patches of 8³ voxels, the encoder's stride, that are 0 in the end; not
            published.

    Returns, from `forward`:
        {"view1", "view2" (B, 1, *size), "locals" (V·B, 1, *local_size), view-major: all normalised;
        "target" (B, 1, *size): view 1 in [0, 1] after flip and affine map, before anything else}.
    """

    def __init__(
        self,
        size: Shape = CUBE_SIZE,
        local_size: Shape = LOCAL_CUBE_SIZE,
        locals_: int = 6,
        flips: Sequence[int] = (0,),
        scale: float = 0.1,
        degrees: float = 10.0,
        blur: float = 2.0,
        noise: float = 0.25,
        log_gamma: float = 0.3,
        swaps: int = 100,
        crop_mm: Sequence[Size] | None = None,
        mask_ratio: float = 0.0,
    ) -> None:
        super().__init__(size, local_size, locals_, GLOBAL_SIZES, MIN_IOU, "z", crop_mm)
        self.mask_ratio = mask_ratio
        self.flips, self.scale, self.degrees = tuple(flips), scale, degrees
        self.blur, self.noise, self.log_gamma = blur, noise, log_gamma
        self.swaps = round(swaps * math.prod(self.size) / math.prod(CUBE_SIZE))

    def change(self, x: Tensor, draws: Columns, seeds: Sequence[int]) -> Tensor:
        """Blur, noise, gamma. 5 columns."""
        x = blur(x, draws.take(3, 0, self.blur))
        x = add_noise_(x, draws.take(1, 0, self.noise), seeds)
        return gamma_(x, draws.take(1, -self.log_gamma, self.log_gamma))

    def hide(self, x: Tensor, draws: Draws) -> Tensor:
        """Large views, view-major, less their hidden patches; stream 5 of the draws."""
        if not self.mask_ratio:
            return x
        grid = tuple(n // HIDDEN_SIDE for n in self.size)
        columns = view_major(draws.uniform(5, 2 * math.prod(grid)), 2)
        visible = visible_patches(columns, grid, self.mask_ratio).to(x.device, x.dtype, non_blocking=True)
        return x * F.interpolate(visible, self.size)  # nearest

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        b, out = len(batch["image"]), {}
        for stream, cubes in enumerate(self.cut(batch, draws)):
            v, large = len(cubes) // b, stream == 0
            columns = view_major(draws.uniform(1 + stream, v * (15 + 6 * self.swaps * large)), v)
            theta = random_affine(columns, cubes.shape[2:], self.flips, self.scale, self.degrees)
            cubes = sample(cubes, theta)
            views = self.change(cubes, columns, seeds_of(draws, 3 + stream))
            if large:
                out["target"] = cubes[:b]
                views = self.normalise(swap_patches(views, columns, self.swaps))
                out["view1"], out["view2"] = self.hide(views, draws).chunk(2)
            else:
                out["locals"] = self.normalise(views)
        return out


class RestorationCubeViews(CutCubes):
    """PCRL's 3D views (arXiv 2109.04379, §4.1): two cubes, blurred, shuffled and painted; their clean states; and both
    views transformed by a code. All stay in [0, 1], and are as long along x as along y.

    Args:
        scale, degrees: ranges of the affine map, in the cubes' voxels; x is mirrored with chance ½.
        blur: largest deviation of the blur in voxels.
        shuffle, paint: chances of local shuffling and of painting; `inner` is the share of in-painting.
        crop_mm: as for `CutCubes`.

    Returns, from `forward`:
        {"view1", "view2", "target", "target2" (B, 1, *size): the views after flip and affine map, before anything
        else; and what `add_transforms` adds}.
    """

    def __init__(
        self,
        size: Shape = CUBE_SIZE,
        scale: float = 0.1,
        degrees: float = 10.0,
        blur: float = 2.0,
        shuffle: float = 0.5,
        paint: float = 0.9,
        inner: float = 0.2,
        crop_mm: Sequence[Size] | None = None,
    ) -> None:
        super().__init__(size, size, 0, PCRL_SIZES, PCRL_MIN_IOU, "unit", crop_mm)
        self.scale, self.degrees, self.blur = scale, degrees, blur
        self.shuffle, self.paint, self.inner = shuffle, paint, inner

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        (cubes,) = self.cut(batch, draws)
        columns = view_major(draws.uniform(1, 2 * (10 + 3 + 1 + 37 + 4)), 2)
        cubes = sample(cubes, random_affine(columns, cubes.shape[2:], (0,), self.scale, self.degrees))
        views = blur(cubes, columns.take(3, 0, self.blur))
        seeds = [seeds_of(draws, stream) for stream in (2, 3, 4, 5)]  # a pair for each of shuffling and painting
        views = local_shuffling(views, columns, seeds[0] + seeds[1], self.shuffle)
        views = painting(views, columns, seeds[2] + seeds[3], self.paint, self.inner)
        out = {f"view{i}": view for i, view in enumerate(views.chunk(2), 1)}
        out |= zip(("target", "target2"), cubes.chunk(2))
        return add_transforms(out, columns, axes=3)


class GenesisCubeViews(CutCubes):
    """Models Genesis' 3D views (arXiv 1908.06912, §3): a cube, and the same changed. Both stay in [0, 1].

    Args:
        flips: axes mirrored with chance ½.
        changes: what is changed of the cube; the published changes unless given.
        crop_mm: as for `CutCubes`.

    Returns, from `forward`:
        {"changed", "target" (B, 1, *size)}.

    Random columns of a volume: stream 1 of `Draws` has 4, as `cut_one` takes them, and those of `changes`; streams 2
    and 3 have its seeds.
    """

    def __init__(
        self, size: Shape = CUBE_SIZE, flips: Sequence[int] = (0, 1, 2), changes: GenesisChanges | None = None,
        crop_mm: Sequence[Size] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(size, size, 0, GLOBAL_SIZES, MIN_IOU, "unit", crop_mm)
        self.flips, self.changes = tuple(flips), changes or GenesisChanges()

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        columns = Columns(draws.uniform(1, 4 + self.changes.columns(3)))
        target = self.cut_one(batch, draws, columns, self.flips).clamp(0, 1)
        changed = self.changes(target, columns, [seeds_of(draws, stream) for stream in (2, 3)])
        return {"changed": changed, "target": target}


class HiddenPatchCubes(CutCubes):
    """Masked autoencoding's 3D views: one of the two cubes that `CutCubes` has, drawn, mirrored, and which of its
    patches are seen.

    Args:
        size: shape of the cubes in voxels. patch: side of a patch, which divides theirs.
        mask_ratio: share of the patches that is hidden.
        flips: axes mirrored with chance ½.
        kind: of normalisation.
        crop_mm: as for `CutCubes`.

    Returns, from `forward`:
        {"image" (B, 1, *size) normalised, "visible" (B, 1, *size / patch) bool}.

    Random columns of a volume: stream 1 of `Draws` has 4, as `cut_one` takes them, and one for each patch.
    """

    def __init__(
        self,
        size: Shape = CUBE_SIZE,
        patch: int = 8,
        mask_ratio: float = 0.6,
        flips: Sequence[int] = (0, 1, 2),
        kind: str = "z",
        crop_mm: Sequence[Size] | None = None,
    ) -> None:
        super().__init__(size, size, 0, GLOBAL_SIZES, MIN_IOU, kind, crop_mm)
        self.grid, self.mask_ratio, self.flips = tuple(n // patch for n in size), mask_ratio, tuple(flips)

    def forward(self, batch: dict, draws: Draws) -> dict[str, Tensor]:
        columns = Columns(draws.uniform(1, 4 + math.prod(self.grid)))
        x = self.cut_one(batch, draws, columns, self.flips)
        visible = visible_patches(columns, self.grid, self.mask_ratio)
        return {"image": self.normalise(x), "visible": visible.to(x.device, non_blocking=True)}


class VolumeClassificationViews(VolumeViews):
    """One view a volume for supervised training and evaluation.

    Args:
        size: shape of the view; by default the volumes' own, which then must be the same.
        flips: axes mirrored with chance ½.
        turns: turn by right angles about z, where the view is square in x and y.
        scale, degrees: ranges of the affine map, in mm where the batch has "size".
        kind: of normalisation; see `VolumeViews`.

    `forward` adds "view" (B, C, *size), normalised, to the batch: random in training mode, plain in evaluation mode.
    """

    def __init__(
        self,
        size: Shape | None = None,
        flips: Sequence[int] = (0, 1, 2),
        turns: bool = True,
        scale: float = 0.1,
        degrees: float = 10.0,
        kind: str = "z",
    ) -> None:
        super().__init__(kind)
        self.size, self.flips, self.turns = None if size is None else tuple(size), tuple(flips), turns
        self.scale, self.degrees = scale, degrees

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        image = batch["image"]
        if self.size is None or (isinstance(image, Tensor) and image.shape[2:] == self.size):
            x = image.float()
        else:
            channels = image[0].shape[0]
            x = resize([channel for volume in image for channel in volume], self.size)
            x = x.view(-1, channels, *self.size)
        if self.training:
            extent = batch["size"].cpu() if "size" in batch else x.shape[2:]
            turns = self.turns and x.shape[2] == x.shape[3]
            columns = Columns(draws.uniform(0, 10))
            x = sample(x, random_affine(columns, extent, self.flips, self.scale, self.degrees, turns))
        return {**batch, "view": self.normalise(x)}


class VolumeSegmentationViews(VolumeViews):
    """Patches of volumes and of their masks for training a segmentation.

    Args:
        patch: shape of the patches in voxels; a volume that is smaller is padded with 0 and label 0.
        foreground: share of the patches that are centred on a labelled voxel, of a label drawn among those present.
            ½ here, as the volumes are few; nnU-Net takes a third.
        flips: axes mirrored with chance ½.
        scale, degrees: ranges of the affine map, in mm where the batch has "size"; 0 and 0 for none.
        blur, noise, log_gamma, contrast: largest deviation of the blur (voxels) and of the noise, logarithm of the
            gamma curve's exponent, and change of contrast about the mean. Each is applied to a quarter of the patches.
        patches: P of each volume, which takes long to read.
        kind: of normalisation; see `VolumeViews`.

    `forward` gives, in training mode, "view" (B·P, C, *patch), each normalised on its own, and "target"
    (B·P, *patch) int64 from "mask" (B, X, Y, Z), a volume's patches after one another; several channels share the
    geometry and the intensity changes. In evaluation mode "view" is the whole volume in [0, 1] and "target" its
    mask: a sliding window normalises what it sees with `normalise`, as training does.
    """

    def __init__(
        self,
        patch: Shape = CUBE_SIZE,
        foreground: float = 0.5,
        flips: Sequence[int] = (0, 1, 2),
        scale: float = 0.1,
        degrees: float = 10.0,
        blur: float = 1.0,
        noise: float = 0.05,
        log_gamma: float = 0.3,
        contrast: float = 0.25,
        patches: int = 1,
        kind: str = "z",
    ) -> None:
        super().__init__(kind)
        self.patch, self.foreground, self.flips = tuple(patch), foreground, tuple(flips)
        self.patches = patches
        self.scale, self.degrees = scale, degrees
        self.blur, self.noise, self.log_gamma, self.contrast = blur, noise, log_gamma, contrast

    def place(self, masks: Sequence[Tensor], draws: Columns) -> Tensor:
        """First voxels (B, 3) of patches that lie in the volume as far as it can hold them. 6 columns."""
        patch = torch.tensor(self.patch)
        shapes = torch.tensor([mask.shape for mask in masks])
        room = shapes - patch  # negative where the volume is smaller: it is centred then
        start = (draws.take(3) * (room.clamp(min=0) + 1)).long()
        centred, label, voxel = draws.take(3).unbind(1)
        for i in torch.nonzero(centred < self.foreground)[:, 0].tolist():
            present = torch.nonzero(torch.bincount(masks[i].reshape(-1), minlength=2)[1:])[:, 0] + 1
            if len(present):
                wanted = torch.nonzero(masks[i] == present[int(label[i] * len(present))])
                start[i] = wanted[int(voxel[i] * len(wanted))].cpu() - patch // 2
        return torch.where(room < 0, room // 2, torch.minimum(start.clamp(min=0), room))

    def forward(self, batch: dict, draws: Draws | None = None) -> dict[str, Tensor]:
        if not self.training:
            return {"view": batch["image"].float(), "target": batch["mask"].long()}
        p = self.patches
        rows = [i for i in range(len(batch["image"])) for _ in range(p)]
        image, mask = ([batch[key][i] for i in rows] for key in ("image", "mask"))
        draws = replace(draws, total=p * draws.total, start=p * draws.start, count=len(rows))
        b, channels = len(rows), image[0].shape[0]
        columns = Columns(draws.uniform(0, 24))
        start = self.place(mask, columns)
        # Rotated patches are cut out of wider windows, so that their corners are not black.
        moved = self.scale > 0 or self.degrees > 0
        margin = torch.tensor([-(-n // 8) if moved else 0 for n in self.patch])
        wide = [n + 2 * int(m) for n, m in zip(self.patch, margin)]
        first = start - margin
        volumes = [channel for volume in image for channel in volume]
        x = windows(volumes, first.repeat_interleave(channels, 0), wide).view(b, channels, *wide)
        y = windows(mask, first, wide)[:, None]
        shapes = torch.tensor([volume.shape[1:] for volume in image])
        spacing = batch["size"][rows].cpu() / shapes if "size" in batch else torch.ones(b, 3)
        inner = torch.tensor(self.patch) / torch.tensor(wide)
        theta = random_affine(columns, spacing * torch.tensor(wide), self.flips, self.scale, self.degrees)
        # The output's corners are at ± patch / window in the window.
        theta[:, :, :3] *= inner
        x = sample(x, theta, self.patch)
        target = sample(y, theta, self.patch, nearest=True)[:, 0].long()
        x = self.change(x, columns, seeds_of(draws, 1))
        return {"view": self.normalise(x), "target": target}

    def change(self, x: Tensor, draws: Columns, seeds: Sequence[int]) -> Tensor:
        """Blur, noise, contrast, gamma, each for a quarter of the patches. 8 columns."""
        # (B, 1) each; a strength of 0 is the identity.
        sigma, std = (draws.take(1, 0, most) * (draws.take(1) < 0.25) for most in (self.blur, self.noise))
        change, curve = (
            draws.take(1, -most, most) * (draws.take(1) < 0.25) for most in (self.contrast, self.log_gamma)
        )
        channels = x.shape[1]
        x = blur(x.flatten(0, 1)[:, None], sigma.repeat_interleave(channels, 0).expand(-1, 3)).view_as(x)
        x = add_noise_(x, std, seeds)
        change = change.view(-1, 1, 1, 1, 1).to(x.device, non_blocking=True)
        x = torch.addcmul(x, x - x.mean((2, 3, 4), keepdim=True), change)
        return gamma_(x, curve)
