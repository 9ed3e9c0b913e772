"""Images per second of PCRLv2's training step (forward, backward, update) on inputs that lie on the device: the
published way against ours, in float32 and mixed precision, and with `--compile` also compiled.

  python benchmarks/step.py                                        (a CPU: 16 images; a GPU: 64 images)
  python benchmarks/step.py --arch resnet50 --b 128 --compile
  python benchmarks/step.py --b 2 --image-size 64 --local-size 32 --steps 1 --repeats 1 --output /tmp/step.json
  python benchmarks/step.py --d 3                                  (volumes; a CPU: 4, a GPU: 32)

"plain" does what the published code does: contiguous NCHW, every decoder level's heads and restoration in every
pass, the restorations up-sampled (in 3D those of large views), the losses read back every step, cuDNN's benchmark
mode. "ours" is the step of engine/loop.py: channels-last, only what the drawn levels need, in 3D each up-sampling and
the convolution after it as one (`unet3d.up_and_convolve`), kernels as `--deterministic` says. The script first makes
sure that both give the same losses and gradient.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl import errors
from medssl.benchmarks.machine import RESULTS, STATUS, add_measuring, alone, interleave, peak_mb, report, summarise
from medssl.benchmarks.variants import (
    PLAIN,
    Variant,
    autocast,
    choose_device,
    choose_variants,
    loop_step,
    set_kernels,
    synchronise,
)
from medssl.engine import options
from medssl.engine.batches import CHANNELS_LAST
from medssl.engine.parallel import Run, make_deterministic
from medssl.models.pcrlv2_model_3d import PCRLv23d
from medssl.models.unet2d import DECODER_CHANNELS
from medssl.train_pcrlv2 import DEFAULTS, MultiScaleUNet, PCRLv2
from medssl.views.ops3d import CUBE_SIZE, LOCAL_CUBE_SIZE

LOCAL_VIEWS = 6
LEVELS = {2: len(DECODER_CHANNELS), 3: PCRLv23d.levels}  # of the decoder


def make_batch(args: argparse.Namespace, kind: str) -> dict[str, Tensor]:
    """A batch of noise as the method takes it, the same for every variant but for its memory layout."""
    generator = torch.Generator().manual_seed(0)
    large = (3, args.image_size, args.image_size) if args.d == 2 else (1, *args.cube_size)
    small = (3, args.local_size, args.local_size) if args.d == 2 else (1, *args.local_cube_size)
    shapes = dict.fromkeys(("view1", "view2", "target"), (args.b, *large)) | {"locals": (LOCAL_VIEWS * args.b, *small)}
    layout = torch.contiguous_format if kind == "plain" else CHANNELS_LAST[args.d]
    return {
        name: torch.randn(shape, generator=generator).to(args.device, memory_format=layout)
        for name, shape in shapes.items()
    }


# The published way ---------------------------------------------------------------------------------


def plain_forward(
    network: MultiScaleUNet | PCRLv23d, x: Tensor, local: bool = False
) -> tuple[list, Tensor | None, list]:
    """Every head of every level, for any input.

    Returns:
        (p, q) of each level, the full restoration (None for local views), each level's restoration up-sampled.
    """
    if isinstance(network, PCRLv23d):
        return plain_forward_3d(network, x, local)
    maps = network.decoder(network.encoder(x))
    embeddings, restorations = [], []
    for level, head in zip(maps, network.heads):
        coarse = head.restore(level)
        embeddings.append(head.embed(level))
        restorations.append(F.interpolate(coarse, size=x.shape[2:], mode="bilinear"))
    return embeddings, None if local else network.output(maps[-1]), restorations


def plain_forward_3d(network: PCRLv23d, x: Tensor, local: bool) -> tuple[list, Tensor | None, list]:
    """The published 3D network, one layer after the other; it restores local views too, but up-samples nothing."""
    level = network.encode(x)[-1]
    embeddings, restorations = [], []
    for block in network.up_blocks:
        level = block.ops(block.up_conv(level))
        p = block.bn(F.adaptive_avg_pool3d(level, 1).flatten(1))
        embeddings.append((p, block.predictor_head(p)))
        coarse = block.deep_supervision_head(level)
        if not local:
            restorations.append(F.interpolate(coarse, size=x.shape[2:], mode="trilinear"))
    return embeddings, torch.sigmoid(network.out_tr(level)), restorations


def plain_losses(
    network: MultiScaleUNet | PCRLv23d, batch: dict[str, Tensor], levels: Sequence[int]
) -> dict[str, Tensor]:
    """The losses of `PCRLv2.forward` at the start of a run (β = 1)."""

    def similarity(one: list, two: list, level: int) -> Tensor:
        (p1, q1), (p2, q2) = one[level], two[level]
        cosine = functools.partial(F.cosine_similarity, dim=1)
        return -0.5 * (cosine(q1, p2.detach()).mean() + cosine(q2, p1.detach()).mean())

    pair, *cross = levels
    first, restored, restorations = plain_forward(network, batch["view1"])
    second, _, _ = plain_forward(network, batch["view2"])
    small, _, _ = plain_forward(network, batch["locals"], local=True)
    local = 0.0
    for v in range(LOCAL_VIEWS):
        rows = slice(v * len(batch["view1"]), (v + 1) * len(batch["view1"]))
        view = [(p[rows], q[rows]) for p, q in small]
        local = local + similarity(first, view, cross[2 * v]) + similarity(second, view, cross[2 * v + 1])
    return {
        "restoration": F.mse_loss(restored, batch["target"]),
        "intermediate": F.mse_loss(restorations[pair], batch["target"]),
        "siamese": similarity(first, second, pair),
        "local": local / (2 * LOCAL_VIEWS),
    }


def plain_step(args: argparse.Namespace, variant: Variant) -> Callable[[list[int]], None]:
    """A function that does one published step with the given levels."""
    torch.manual_seed(0)
    network = PCRLv2(args.arch, LOCAL_VIEWS, args.d).network.to(args.device).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, weight_decay=1e-4)
    batch = make_batch(args, "plain")

    def step(levels: list[int]) -> None:
        with autocast(args, variant):
            losses = plain_losses(network, batch, levels)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for value in (*losses.values(), loss):
            value.item()

    return step


# Ours ----------------------------------------------------------------------------------------------


def our_step(args: argparse.Namespace, variant: Variant) -> Callable[[list[int]], None]:
    """A function that does one step of engine/loop.py with the given levels."""
    torch.manual_seed(0)
    method = PCRLv2(args.arch, LOCAL_VIEWS, args.d)
    method.to(args.device, memory_format=CHANNELS_LAST[args.d]).train()
    batch = make_batch(args, "ours")
    return loop_step(args, variant, method, method.parameters(), 1e-2, lambda levels: method(batch, Run(), levels))


# Measuring -----------------------------------------------------------------------------------------


def refuse_difference(args: argparse.Namespace) -> float:
    """The largest relative difference between the two ways' losses and gradients.

    Measured in float32 and evaluation mode, with the same weights and levels.

    Raises:
        RuntimeError: when it is above 10⁻³; then speeds would not compare.
    """
    torch.manual_seed(0)
    method = PCRLv2(args.arch, LOCAL_VIEWS, args.d).to(args.device).eval()
    levels = method.draw_levels(torch.Generator().manual_seed(0))
    weights = [p for p in method.network.encoder.parameters() if p.requires_grad]
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    values = []
    for kind in ("plain", "ours"):
        batch = make_batch(args, kind)
        if kind == "ours":
            method.to(memory_format=CHANNELS_LAST[args.d])
            losses = method(batch, Run(), levels)
        else:
            losses = plain_losses(method.network, batch, levels)
        gradient = torch.autograd.grad(sum(losses.values()), weights)
        values.append({name: loss.detach() for name, loss in losses.items()})
        values[-1]["gradient"] = torch.cat([g.flatten() for g in gradient])
    torch.backends.cudnn.allow_tf32 = allowed
    plain, ours = values
    worst = max(float((plain[name] - ours[name]).norm() / plain[name].norm()) for name in plain)
    if plain.keys() != ours.keys() or not worst < 1e-3:
        raise RuntimeError(f"plain and ours do not compute the same: losses or gradients differ by {worst:.1e}")
    return worst


def prepare(args: argparse.Namespace, variant: Variant) -> Callable[[list[int]], None]:
    """A step that is compiled and warm. Sets the kernels that the variant uses."""
    set_kernels(args, variant)
    step = {"plain": plain_step, "ours": our_step}[variant.kind](args, variant)
    levels = LEVELS[args.d]
    for pair in range(levels if variant.compiled else 1):
        step([pair, *(i % levels for i in range(2 * LOCAL_VIEWS))])  # all levels, and each one's restoration
    return step


class Timer:
    """Each call times the next `--steps` steps of a variant, and returns images per second."""

    def __init__(self, args: argparse.Namespace, variant: Variant) -> None:
        self.args, self.variant, self.done = args, variant, 0
        self.step = prepare(args, variant)

    def __call__(self) -> float:
        args = self.args
        set_kernels(args, self.variant)
        first, self.done = self.done, self.done + args.steps
        draws = [  # the k-th step has the same levels in every variant
            torch.randint(LEVELS[args.d], (1 + 2 * LOCAL_VIEWS,), generator=torch.Generator().manual_seed(k)).tolist()
            for k in range(first, self.done)
        ]
        synchronise(args)
        started = time.perf_counter()
        for levels in draws:
            self.step(levels)
        synchronise(args)
        return args.b * args.steps / (time.perf_counter() - started)


def peak_memory(args: argparse.Namespace, variant: Variant) -> float:
    """MB that training needs: of the GPU, or of the process beyond what its imports take.

    To be called in a process of its own (`alone`).
    """
    torch.set_num_threads(args.threads)
    before = 0 if args.device == "cuda" else peak_mb()
    step = prepare(args, variant)
    step([0, *(i % LEVELS[args.d] for i in range(2 * LOCAL_VIEWS))])
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_mb() - before


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("steps")
    group.add_argument("--d", type=int, choices=(2, 3), default=2, help="images or volumes")
    group.add_argument(
        "--b", type=options.positive_int, help="images per step; 16 on a CPU, 64 on a GPU; volumes: 4 and 32"
    )
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of the large views, pixels")
    group.add_argument("--local-size", type=options.positive_int, default=96, help="side of the local views, pixels")
    axes = {"type": options.positive_int, "nargs": 3, "metavar": ("X", "Y", "Z")}
    group.add_argument("--cube-size", **axes, default=list(CUBE_SIZE), help="sides of the large cubes, voxels (3D)")
    group.add_argument(
        "--local-cube-size", **axes, default=list(LOCAL_CUBE_SIZE), help="sides of the local cubes, voxels (3D)"
    )
    group.add_argument("--arch", help="encoder, as for train_pcrlv2.py; by default resnet18, in 3D unet3d")
    group = add_measuring(parser, None, "the JSON file; step.json or step_3d.json beside the others")
    group.add_argument(
        "--steps", type=options.positive_int, help="steps timed at once; 30 on a GPU, 3 on a CPU (3D: 1)"
    )
    group.add_argument("--threads", type=options.positive_int, help="of PyTorch on the CPU; its own choice by default")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="kind of device")
    group.add_argument("--compile", action="store_true", help="measure compiled networks too (minutes on a CPU)")
    options.flag(group, "--deterministic", True, "ours with the kernels that training uses by default (GPUs only)")
    options.flag(group, "--memory", True, "measure peak memory too, each variant in a process of its own")
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print the table, write and return the report."""
    args = get_parser().parse_args(argv)
    args.device = choose_device(args.device)
    cuda = args.device == "cuda"
    threads = torch.get_num_threads()
    defaults = {
        "arch": DEFAULTS[args.d]["arch"],
        "b": DEFAULTS[args.d]["b"] if cuda else {2: 16, 3: 4}[args.d],
        "steps": 30 if cuda else {2: 3, 3: 1}[args.d],
        "output": str(RESULTS / {2: "step.json", 3: "step_3d.json"}[args.d]),
        "threads": threads,
    }
    args = options.complete(args, defaults)
    if args.b < 2:
        raise errors.InputError("--b 1: batch norm of single images is not possible; use 2 or more")
    torch.set_num_threads(args.threads)
    if cuda:
        make_deterministic(args.deterministic)  # before CUDA starts, which reads the setting of cuBLAS
    try:
        return measure(args)
    finally:
        torch.set_num_threads(threads)
        if cuda:
            make_deterministic(False)


def measure(args: argparse.Namespace) -> dict:
    """Everything that `main` does, with all options known."""
    difference = refuse_difference(args)
    print(f"plain and ours agree: losses and gradients differ by {difference:.0e}")
    variants = choose_variants(args.device == "cuda", args.compile)
    timers = {str(variant): Timer(args, variant) for variant in variants}
    results = summarise(interleave(timers, args.repeats), str(PLAIN))
    timers.clear()
    if args.memory and (args.device == "cuda" or STATUS.exists()):
        for variant in variants:
            results[str(variant)]["peak_mb"] = alone(peak_memory, args, variant)
    return report(args.output, "step", vars(args), results, difference=difference)


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
