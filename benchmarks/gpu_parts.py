"""What `gpu.py` checks and measures: a function a part, each of one method, in a process that may be killed."""

import gc
import importlib
import inspect
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from medssl.benchmarks import pipeline, step
from medssl.benchmarks.methods import BASELINE, EXTRA, METHODS, dims_of, parser_of, read_windows, write_images
from medssl.datasets import cache
from medssl.engine.batches import CHANNELS_LAST, to_device, training_batches
from medssl.engine.loop import pretrain
from medssl.engine.monitor import loss_names
from medssl.engine.parallel import Run
from medssl.errors import explain
from medssl.files import read_lines, write_folder
from medssl.markup import one_line
from medssl.processes import end_with_parent
from medssl.reading.volumes import simpleitk, write_image
from medssl.study.jobs import INTERRUPTED
from medssl.views.draws import Draws

STEPS = 4  # of a checked run; one that is stopped, is stopped in the middle
SCALING = 12  # of a run in fp16, whose loss scaling skips steps until it has found its scale
# Largest differences. Those of single precision come from sums in another order, and grow with every step; those of
# mixed precision are of the first step alone, as skipped ones of fp16 leave weights behind.
SPLIT, GRADIENT, FIRST, LATER, MIXED = 1e-4, 1e-3, 1e-3, 1e-2, 0.1


class NotHere(Exception):
    """A part cannot be run on this machine; its text says why."""


@dataclass(frozen=True)
class Sizes:
    """How much is computed. Sides of cubes are in voxels, of views in pixels; `files` are the images, of noise."""

    files: int
    side: int
    b: int
    cube: tuple[int, int, int]
    cubes: int
    arch: dict[int, str]
    window: int = 1  # steps of a window that is measured; the first of four does not count


@dataclass(frozen=True)
class Place:
    """Where and how cells are run: "cuda" or "cpu", a folder for runs, decoding processes, and the sizes of runs that
    are checked and of those that are measured."""

    device: str
    folder: Path
    workers: int
    checked: Sizes
    measured: Sizes
    radiograph: int  # side of the files that are decoded


@dataclass(frozen=True)
class Cell:
    """One part for one method, in 2D or 3D; `variant` tells cells of a part apart that have the same method."""

    part: str
    method: str
    dims: int
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, [self.method, f"{self.dims}D", self.variant]))


def cells() -> list[Cell]:
    """All that can be run, in the order of `PARTS`; within a part, what matters most first."""
    cases = [(method, dims) for method in METHODS for dims in dims_of(method)]
    flat = [method for method, dims in cases if dims == 2]
    found = [Cell(name, *case) for name, part in PARTS.items() if part.check for case in cases]
    found += [Cell("methods", method, 2, "resnet18" if takes_arch(method) else "") for method in flat]
    found += [Cell("methods", *case) for case in cases if case[1] == 3]
    found += [Cell("methods", method, 2, "resnet50") for method in flat if takes_arch(method)]
    found += [Cell("data", BASELINE, 2, kind) for kind in ("decoding", "cache")]
    found += [Cell("plain", "pcrlv2", 2, "step"), Cell("plain", "pcrlv2", 3, "step")]
    found += [Cell("plain", "pcrlv2", 2, "pipeline"), Cell("lightly", "simclr", 2)]
    return sorted(found, key=lambda cell: [*PARTS].index(cell.part))


def takes_arch(method: str) -> bool:
    """Whether a method's encoder is one of those that others have too; a transformer's script has its own."""
    return (parser_of(method).get_default("arch") or "resnet").startswith("resnet")


# Runs ----------------------------------------------------------------------------------------------


def words(cell: Cell, place: Place, sizes: Sizes, device: str | None = None) -> list[str]:
    """The options of a run of the cell's method on noise; those that its script has."""
    device = device or place.device
    given = ["--gpus", "0"] if device == "cuda" else ["--device", "cpu"]
    given += [
        "--data",
        str(data_of(cell, place, sizes)),
        "--dataset",
        "folder",
        "--d",
        str(cell.dims),
        "--epochs",
        "1000000",
    ]
    wanted: dict[str, Sequence[object]] = {"--queue": [1024]}
    if cell.dims == 2:
        given += [*EXTRA.get(cell.method, []), "--texture-size", str(2 * sizes.side)]
        wanted |= {"--image-size": [sizes.side], "--local-size": [max(32, sizes.side * 3 // 7 // 32 * 32)]}
    else:
        wanted |= {"--cube-size": sizes.cube, "--local-cube-size": [max(8, side // 4) for side in sizes.cube]}
    if takes_arch(cell.method):
        arch = cell.variant if cell.variant.startswith("resnet") else sizes.arch[cell.dims]
        wanted["--arch"] = [arch]
    known = parser_of(cell.method)._option_string_actions  # of which argparse has no public list
    for option, values in wanted.items():
        given += [option, *map(str, values)] if option in known else []
    return [*given, "--b", str(sizes.b if cell.dims == 2 else sizes.cubes)]


def data_of(cell: Cell, place: Place, sizes: Sizes) -> Path:
    """A folder of images or volumes of noise, made when it is first asked for."""
    folder = place.folder / f"noise_{cell.dims}d_{sizes.files}"
    if not folder.exists() and cell.dims == 2:
        write_folder(folder, lambda empty: write_images(empty, sizes.side, sizes.files))
    elif not folder.exists():
        write_folder(folder, lambda empty: write_volumes(empty, sizes.cube, 2 * sizes.cubes))
    return folder


def write_volumes(folder: Path, cube: Sequence[int], count: int) -> None:
    """NIfTI volumes of noise, half as large again as the cubes that are cut out."""
    for i in range(count):
        noise = np.random.default_rng(i).integers(-1000, 1000, [side * 3 // 2 for side in cube[::-1]], np.int16)
        write_image(simpleitk().GetImageFromArray(noise), folder / f"{i:03d}.nii.gz")


def train(cell: Cell, place: Place, name: str, *more: object) -> Path:
    """The folder of a run of the method's script with these options, in this process."""
    folder = place.folder / "runs" / f"{cell.method}_{cell.dims}d_{cell.variant}" / name
    importlib.import_module(f"medssl.train_{cell.method}").main([*map(str, more), "--output", str(folder)])
    return folder


def checked(cell: Cell, place: Place, name: str, *more: object, device: str | None = None) -> Path:
    """A short run with every step's losses, the first of which does not depend on how it is run."""
    given = [*words(cell, place, place.checked, device), "--workers", 0, "--log-every", 1]
    return train(cell, place, name, *given, *([] if "--steps" in more else ["--steps", STEPS]), *more)


def losses_of(folder: Path) -> list[dict[str, float]]:
    """A run's losses at each step; what was not finite is NaN."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line and "lr" in line]
    names = loss_names(lines)
    return [{name: math.nan if line.get(name) is None else line[name] for name in names} for line in lines]


def difference(one: dict[str, float], two: dict[str, float]) -> float:
    """The largest relative difference of named losses, absolute for those below 1; infinite where one is not finite
    or has no counterpart."""
    if one.keys() != two.keys() or not all(map(math.isfinite, [*one.values(), *two.values()])):
        return math.inf
    return max(abs(one[name] - two[name]) / max(1.0, abs(one[name])) for name in one)


def compare_losses(one: Path, two: Path, steps: int = STEPS) -> tuple[bool, dict[str, float]]:
    """Whether two runs have the same losses, within what an order of sums changes."""
    pairs = list(zip(losses_of(one), losses_of(two)))[:steps]
    found = [difference(*pair) for pair in pairs]
    good = len(found) == steps and found[0] <= FIRST and max(found) <= LATER
    return good, {"steps": len(found), "first step": found[0], "largest": max(found)}


# Checks --------------------------------------------------------------------------------------------


class Halves(Run):
    """Two calls on halves of the inputs: what DataParallel does, for a device of which it knows nothing."""

    parts = 2

    def __call__(self, net: nn.Module, *inputs: Tensor, **named: object) -> object:
        return joined([net(*half, **named) for half in zip(*(x.chunk(2) for x in inputs))])


def joined(parts: Sequence[object]) -> object:
    """Concatenate tensors, also inside dicts, lists and tuples."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    return type(first)(joined(list(part)) for part in zip(*parts))


def batch_norm_eval(method: nn.Module) -> nn.Module:
    """Training mode, but batch norms use their running statistics, which do not depend on how a batch is split."""
    method.train()
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return method


def given_to_pretrain(method: str, argv: Sequence[str]) -> dict[str, object]:
    """What the method's script hands to `pretrain`, by its arguments' names, instead of training."""
    script, found = importlib.import_module(f"medssl.train_{method}"), {}
    kept = script.pretrain
    script.pretrain = lambda *args, **named: found.update(inspect.signature(pretrain).bind(*args, **named).arguments)
    try:
        script.main(argv)
    finally:
        script.pretrain = kept
    return found


def split(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """Losses and gradients of a batch in two parts against those of the whole, batch norms in evaluation mode."""
    output = ["--workers", "0", "--output", str(place.folder / "split")]
    given = given_to_pretrain(cell.method, [*words(cell, place, place.checked), *output])
    method, views, args, devices = (given[name] for name in ("method", "views", "args", "devices"))
    method.to(devices.device, memory_format=CHANNELS_LAST[cell.dims])
    views.to(devices.device)
    if given.get("before_epoch"):
        given["before_epoch"](0)  # which may look at images in evaluation mode
    views.train()
    with training_batches(given["data"], args, devices, slice(0, args.b), 0, 1) as batches, torch.no_grad():
        inputs = views(to_device(next(batches), devices.device), Draws((args.seed, 0), args.b))
    batch_norm_eval(method)

    def go(run: type[Run], ids: list[int], low: bool = False) -> tuple[dict[str, float], Tensor]:
        torch.manual_seed(0)
        method.zero_grad()
        with torch.autocast(place.device, torch.bfloat16, enabled=low):
            losses = method(inputs, run(ids, torch.Generator().manual_seed(0)))
        sum(losses.values()).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in method.parameters() if p.requires_grad]
        return {name: value.item() for name, value in losses.items()}, torch.cat([g.flatten() for g in gradients])

    parallel = (Run, [0, 0]) if place.device == "cuda" else (Halves, [])  # one GPU may stand for two
    (whole, gradient), (parts, other) = go(Run, []), go(*parallel)
    low, _ = go(*parallel, low=True)
    apart = float((gradient - other).norm() / gradient.norm())
    numbers = {"losses": difference(whole, parts), "gradient": apart, "losses in bf16": difference(whole, low)}
    good = numbers["losses"] <= SPLIT and apart <= GRADIENT and numbers["losses in bf16"] <= MIXED
    return good, numbers


def cpu(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """Two steps against the CPU's."""
    if place.device == "cpu":
        raise NotHere("the device is the CPU itself")
    steps = STEPS // 2
    there = checked(cell, place, "cpu", "--steps", steps, device="cpu")
    return compare_losses(there, checked(cell, place, "plain"), steps)


def amp(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """Losses in bfloat16 and float16 against those in full precision, and steps that loss scaling skips."""
    plain, numbers = losses_of(checked(cell, place, "plain")), {}
    good = len(plain) == STEPS
    for dtype in ("bf16", "fp16"):
        steps = STEPS if dtype == "bf16" else SCALING
        folder = checked(cell, place, dtype, "--amp", "--amp-dtype", dtype, "--steps", steps)
        low = losses_of(folder)
        numbers[dtype] = difference(plain[0], low[0])
        finite = all(math.isfinite(value) for line in low for value in line.values())
        good &= finite and len(low) == steps and numbers[dtype] <= MIXED
    scaler = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)["scaler"]
    # A skipped step halves the scale, which starts at 2**16; a step that is not makes its tracker count.
    numbers["fp16 steps skipped"] = round(16 - math.log2(scaler["scale"]))
    return good and numbers["fp16 steps skipped"] <= SCALING // 2 and scaler["_growth_tracker"] > 0, numbers


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What a run exports, and the weights in its checkpoint."""

    def flat(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from flat(f"{name}/{key}", part)
        elif isinstance(value, Tensor):
            yield name, value

    exported, saved = (torch.load(folder / f"{name}.pt", "cpu", weights_only=True) for name in ("encoder", "last"))
    return dict([*flat("encoder", exported), *flat("method", saved["method"])])


def differing(one: Path, two: Path) -> int:
    """How many tensors of two runs are not the same bits."""
    a, b = tensors_of(one), tensors_of(two)
    return len(a.keys() ^ b.keys()) + sum(not torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


def resume(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """A run that was stopped half-way and continued against one that was not, bit for bit."""
    whole = checked(cell, place, "plain")
    checked(cell, place, "continued", "--steps", STEPS // 2)
    different = differing(whole, checked(cell, place, "continued"))
    numbers = {"tensors": len(tensors_of(whole)), "that differ": different}
    if different:  # kernels that are not deterministic would be the reason
        numbers["that differ without a stop"] = differing(whole, checked(cell, place, "again"))
    return different == 0, numbers


def compiled(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """Losses of compiled networks."""
    torch._dynamo.reset()  # of programs of other methods
    return compare_losses(checked(cell, place, "plain"), checked(cell, place, "compiled", "--compile"))


# Measurements --------------------------------------------------------------------------------------


def speed_of(cell: Cell, place: Place, *more: object) -> tuple[bool, dict[str, float]]:
    """Images a second in bfloat16, the median of windows, its extent, the share of time that waits for data, and peak
    memory, of a GPU alone: that of this process is of all that it has done."""
    sizes = place.measured
    given = [*words(cell, place, sizes), "--amp", "--workers", place.workers, *more]
    lines = read_windows(train(cell, place, "speed", *given, "--steps", 4 * sizes.window, "--log-every", sizes.window))
    speeds = [line["images_per_s"] for line in lines]
    numbers = {"images_per_s": median(speeds), "lowest": min(speeds), "highest": max(speeds)}
    numbers |= {"b": sizes.b if cell.dims == 2 else sizes.cubes, "data_wait": median(x["data_wait"] for x in lines)}
    if place.device == "cuda":
        numbers["peak_mb"] = max(line["peak_memory_mib"] for line in lines) * 2**20 / 1e6
    return True, numbers


def methods(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """A method's speed on images that are decoded already; volumes are kept after the first pass."""
    folder = place.folder / f"cache_{cell.dims}d"
    if cell.dims == 2 and not folder.exists():
        argv = [*words(Cell("methods", BASELINE, 2), place, place.measured), "--output", "unused"]
        images = given_to_pretrain(BASELINE, argv)["data"]
        write_folder(folder, lambda empty: cache.build(images, empty, place.workers))
    return speed_of(cell, place, "--cache", folder)


def data(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """The wait for files as radiographs are, decoded each time or from a cache."""
    folder = place.folder / "radiographs"
    if not folder.exists():
        count = max(place.measured.b, 64)
        write_folder(folder, lambda empty: pipeline.write_images(empty, count, place.radiograph))
    more = ["--data", folder]
    if cell.variant == "cache":
        argv = [*words(cell, place, place.measured), "--output", "unused", "--data", str(folder)]
        cache.build(given_to_pretrain(cell.method, argv)["data"], place.folder / "cached", place.workers)
        more += ["--cache", place.folder / "cached"]
    passed, numbers = speed_of(cell, place, *more)
    return passed, numbers | {"workers": place.workers}


def plain(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """Ours against the plain recipe: `step.py` and `pipeline.py`, as they are."""
    sizes, output = place.measured, ["--repeats", "2", "--output", str(place.folder / "plain.json")]
    if cell.variant == "pipeline":
        b = max(sizes.b // 16, 2)  # so few that every process makes several batches
        given = ["--images", str(b * max(place.workers, 2)), "--b", str(b), "--size", str(place.radiograph)]
        given += ["--workers", str(place.workers)]
        content = pipeline.main([*given, "--passes", "2", *output])
    else:
        given = ["--d", str(cell.dims), "--device", place.device, "--steps", str(2 * sizes.window), "--no-memory"]
        given += ["--b", str(min(sizes.b, 64) if cell.dims == 2 else sizes.cubes), "--arch", sizes.arch[cell.dims]]
        given += ["--image-size", str(sizes.side), "--local-size", str(max(32, sizes.side * 3 // 7 // 32 * 32))]
        given += ["--cube-size", *map(str, sizes.cube)]
        given += ["--local-cube-size", *(str(max(8, side // 4)) for side in sizes.cube)]
        content = step.main([*given, *output])
    rows = content["results"].items()
    return True, {f"{name}: {key}": row[key] for name, row in rows for key in ("images_per_s", "ratio")}


def lightly(cell: Cell, place: Place) -> tuple[bool, dict[str, float]]:
    """SimCLR's images a second on the same files, in lightly and in ours, both decoding."""
    try:
        names = ("data", "loss", "models.modules", "transforms")
        files, loss, modules, transforms = (importlib.import_module(f"lightly.{name}") for name in names)
    except ImportError as error:
        raise NotHere(f"lightly cannot be imported ({one_line(str(error))})") from None
    sizes = place.measured
    found = files.LightlyDataset(str(data_of(cell, place, sizes)), transforms.SimCLRTransform(input_size=sizes.side))
    order = torch.randint(len(found), (4 * sizes.window * sizes.b,)).tolist()
    loader = torch.utils.data.DataLoader(  # one pass through all, as ours, whose workers are not begun anew
        found, sizes.b, sampler=order, num_workers=place.workers, pin_memory=place.device == "cuda"
    )
    network = torchvision.models.resnet18()
    network.fc = modules.SimCLRProjectionHead(512, 512, 128)
    network.to(place.device, memory_format=torch.channels_last).train()
    criterion, optimizer = loss.NTXentLoss(), torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    speeds, since = [], time.perf_counter()
    for i, ((one, two), *_) in enumerate(loader, 1):
        with torch.autocast(place.device, torch.bfloat16):
            z = [network(x.to(place.device, memory_format=torch.channels_last)) for x in (one, two)]
            value = criterion(*z)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        if i % sizes.window == 0:
            value.item()  # waits for the GPU
            speeds.append(sizes.b * sizes.window / (time.perf_counter() - since))
            since = time.perf_counter()
    ours = speed_of(cell, place)[1]["images_per_s"]
    return True, {"lightly: images_per_s": median(speeds[1:]), "ours: images_per_s": ours}


# In a process of its own ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part: its function, its share of the time, to which comes what the parts before it left, and whether it
    checks or measures."""

    run: Callable[[Cell, Place], tuple[bool, dict[str, float]]]
    share: float
    check: bool = True

    @property
    def done(self) -> str:
        """What a row is that did not fail."""
        return "passed" if self.check else "measured"


PARTS = {
    "split": Part(split, 0.1),
    "cpu": Part(cpu, 0.1),
    "amp": Part(amp, 0.12),
    "resume": Part(resume, 0.08),
    "methods": Part(methods, 0.25, check=False),
    "data": Part(data, 0.07, check=False),
    "plain": Part(plain, 0.1, check=False),
    "lightly": Part(lightly, 0.03, check=False),
    "compile": Part(compiled, 0.15),  # takes minutes, and comes last
}


def outcome(cell: Cell, place: Place) -> dict:
    """Run a cell: whether it passed (None: it cannot be run here), its numbers or the reason, and its seconds."""
    since, part = time.perf_counter(), PARTS[cell.part]
    print(f"\n{cell.part}: {cell.name}", flush=True)
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.backends.cudnn.allow_tf32 = not part.check  # whose ten bits of a number would hide what is checked
    try:
        passed, numbers = part.run(cell, place)
        row = {"passed": bool(passed), "numbers": {name: float(f"{value:.4g}") for name, value in numbers.items()}}
    except NotHere as error:
        row = {"passed": None, "reason": str(error)}
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in INTERRUPTED:
            raise
        traceback.print_exc()
        row = {"passed": False, "reason": one_line(explain(error) or f"{type(error).__name__}: {error}")}
    for folder in (place.folder / "runs").glob("*/*"):  # of large checkpoints
        if folder.name != "plain":  # which other checks have too
            shutil.rmtree(folder)
    return row | {"seconds": round(time.perf_counter() - since, 2)}


def work(todo: Sequence[Cell], place: Place, rows: Connection) -> None:
    """Run cells one after the other, and send what came of each. What scripts print goes to log.txt."""
    end_with_parent()
    log = os.open(place.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts, which runs want deterministic
    for cell in todo:
        rows.send(outcome(cell, place))
