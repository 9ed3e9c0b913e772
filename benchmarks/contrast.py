"""Images per second of the training steps of C2L and PCRL (forward, backward, update, teacher, queue) on inputs that
lie on the device: the published way against ours.

  python benchmarks/contrast.py                                    (a CPU: 16 images; a GPU: 64 images)
  python benchmarks/contrast.py --methods c2l --arch resnet50 --b 128
  python benchmarks/contrast.py --b 4 --image-size 64 --queue 64 --steps 1 --repeats 1 --output /tmp/contrast.json

"plain" does what the published code does: contiguous NCHW; each contrast enqueues its own keys at once; the student's
features are mixed though no loss takes them; teacher inputs are shuffled and put back also where one device sees the
whole batch; the teacher follows one weight after the other; losses are read back every step. "ours" is the step of
engine/loop.py. The script first makes sure that both give the same losses and gradient when they have the same queue.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl import errors
from medssl.benchmarks.machine import STATUS, add_measuring, alone, interleave, peak_mb, report, summarise
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
from medssl.train_c2l import C2L
from medssl.train_pcrl import PCRL

METHODS = {"c2l": C2L, "pcrl": PCRL}
LR = {"c2l": 0.03, "pcrl": 1e-3}


def make_method(args: argparse.Namespace, name: str) -> C2L | PCRL:
    """The method with fixed weights."""
    torch.manual_seed(0)
    return METHODS[name](args.arch, queue=args.queue).to(args.device)


def make_batch(args: argparse.Namespace, kind: str) -> dict[str, Tensor]:
    """A batch of noise as either method takes it, the same for every variant but for its memory layout."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.contiguous_format if kind == "plain" else CHANNELS_LAST[2]
    names = ("view1", "view2", "target", "target2", "turned1", "turned2")
    shape = (args.b, 3, args.image_size, args.image_size)
    batch = {name: torch.randn(shape, generator=generator).to(args.device, memory_format=layout) for name in names}
    codes = {f"code{i}": (torch.rand(args.b, 6, generator=generator) < 0.5).float().to(args.device) for i in (1, 2)}
    return batch | codes


# The published way ---------------------------------------------------------------------------------


class Draws:
    """A step's random choices, as `Run` makes them: the same for both ways."""

    def __init__(self, seed: int, name: str, images: int) -> None:
        run = Run(generator=torch.Generator().manual_seed(seed))
        if name == "c2l":
            self.shuffle = run.permutation(images)
        self.weight = self.fold(run)
        self.order = run.permutation(images)
        if name == "pcrl":
            self.alphas = self.fold(run), self.fold(run)
            self.shuffle = run.permutation(images)

    @staticmethod
    def fold(run: Run) -> float:
        value = torch.rand((), generator=run.generator).item()
        return max(value, 1 - value)


def contrast(q: Tensor, k: Tensor, method: C2L | PCRL, enqueue: bool) -> Tensor:
    """InfoNCE against the queue, into which the keys go at once."""
    q, k = (x / x.pow(2).sum(1, keepdim=True).sqrt() for x in (q.float(), k.float()))
    queue = method.contrast.queue
    logits = torch.cat([(q * k.detach()).sum(1, keepdim=True), q @ queue.keys.clone().T], 1)
    loss = F.cross_entropy(
        logits / method.contrast.loss.temperature, torch.zeros(len(q), dtype=torch.long, device=q.device)
    )
    if enqueue:
        with torch.no_grad():
            places = torch.fmod(torch.arange(len(k), device=k.device) + queue.pointer, len(queue.keys)).long()
            queue.keys.index_copy_(0, places, k.detach())
            queue.pointer.copy_((queue.pointer + len(k)) % len(queue.keys))
    return loss


def teach(teacher: torch.nn.Module, x: Tensor, shuffle: Tensor) -> tuple:
    """The teacher on the shuffled batch; embedding (and maps) put back in order."""
    back = shuffle.argsort()
    with torch.no_grad():
        out = teacher(x[shuffle])
        if isinstance(out, dict):
            return out["z"][back], [m[back] for m in out["maps"]]
        return out[1][back], []


def plain_losses(method: C2L | PCRL, batch: dict[str, Tensor], draws: Draws, enqueue: bool = True) -> dict[str, Tensor]:
    """The published forward passes, with the queue changing between the contrasts."""
    x1, x2 = batch["view1"], batch["view2"]
    shuffle, order = draws.shuffle.to(x1.device), draws.order.to(x1.device)

    def mix(a: Tensor) -> Tensor:
        return draws.weight * a + (1 - draws.weight) * a[order, :]

    k, maps_k = teach(method.teacher, x2, shuffle)
    student = method.student(x1)
    q = student["z"] if maps_k else student[1]
    first = contrast(q, k, method, enqueue)
    mixed1, _ = mix(x1.clone()), mix(q.clone())
    mixed2, mixed_k = mix(x2.clone()), mix(k.clone())
    k_mixed, maps_k_mixed = teach(method.teacher, mixed2, shuffle)
    mixed = method.student(mixed1)
    q_mixed = mixed["z"] if maps_k else mixed[1]
    contrasts = (first + contrast(q_mixed, k_mixed, method, enqueue) + contrast(q_mixed, mixed_k, method, enqueue)) / 3
    if not maps_k:
        return {"contrast": contrasts}

    net, (alpha1, alpha2) = method.student, draws.alphas

    def decode(maps: list[Tensor]) -> Tensor:
        return net(*maps, decode=True)

    def coded(maps: list[Tensor], code: Tensor) -> list[Tensor]:
        return [*maps[:-1], maps[-1].clone() * net.attention(code).view(len(code), -1, 1, 1)]

    def between(a: list[Tensor], b: list[Tensor], alpha: float) -> list[Tensor]:
        return [alpha * one + (1 - alpha) * other for one, other in zip(a, b)]

    own, other = coded(student["maps"], batch["code1"]), coded(maps_k, batch["code2"])
    gt1, gt2 = mix(batch["target"].clone()), mix(batch["target2"].clone())
    turned1, turned2 = batch["turned1"], batch["turned2"]
    errors = [
        F.mse_loss(decode(own), turned1),
        F.mse_loss(decode(mixed["maps"]), gt1),
        F.mse_loss(decode(between(own, other, alpha1)), alpha1 * turned1 + (1 - alpha1) * turned2),
        F.mse_loss(decode(between(mixed["maps"], maps_k_mixed, alpha2)), alpha2 * gt1 + (1 - alpha2) * gt2),
    ]
    return {"contrast": contrasts, "restoration": sum(errors) / 4}


def plain_step(args: argparse.Namespace, name: str, variant: Variant) -> Callable[[int], None]:
    """A function that does one published step."""
    method = make_method(args, name).train()
    optimizer = torch.optim.SGD(method.student.parameters(), LR[name], momentum=0.9, weight_decay=1e-4)
    batch = make_batch(args, "plain")

    def step(seed: int) -> None:
        with autocast(args, variant):
            losses = plain_losses(method, batch, Draws(seed, name, args.b))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p1, p2 in zip(method.student.parameters(), method.teacher.parameters()):
            p2.data.mul_(0.999).add_(p1.detach().data, alpha=0.001)
        for value in (*losses.values(), loss):
            value.item()

    return step


# Ours ----------------------------------------------------------------------------------------------


def our_step(args: argparse.Namespace, name: str, variant: Variant) -> Callable[[int], None]:
    """A function that does one step of engine/loop.py with the given seed."""
    method = make_method(args, name).to(memory_format=CHANNELS_LAST[2]).train()
    batch = make_batch(args, "ours")

    def losses_of(seed: int) -> dict[str, Tensor]:
        return method(batch, Run(generator=torch.Generator().manual_seed(seed)))

    return loop_step(args, variant, method, method.student.parameters(), LR[name], losses_of)


# Measuring -----------------------------------------------------------------------------------------


def refuse_difference(args: argparse.Namespace, name: str) -> float:
    """The largest relative difference between the two ways' losses and gradients, in float32 and evaluation mode.

    Raises:
        RuntimeError: when it is above 10⁻³; then speeds would not compare.
    """
    method = make_method(args, name).eval()
    weights = list(method.student.encoder.parameters())
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    values = []
    for kind in ("plain", "ours"):
        batch = make_batch(args, kind)
        if kind == "ours":
            method.to(memory_format=CHANNELS_LAST[2])
            losses = method(batch, Run(generator=torch.Generator().manual_seed(0)))
            contrasts = sum(loss for key, loss in losses.items() if key != "restoration")
            losses = {"contrast": contrasts} | {k: v for k, v in losses.items() if k == "restoration"}
        else:
            losses = plain_losses(method, batch, Draws(0, name, args.b), enqueue=False)
        gradient = torch.autograd.grad(sum(losses.values()), weights)
        values.append({key: loss.detach() for key, loss in losses.items()})
        values[-1]["gradient"] = torch.cat([g.flatten() for g in gradient])
    torch.backends.cudnn.allow_tf32 = allowed
    plain, ours = values
    worst = max(float((plain[key] - ours[key]).norm() / plain[key].norm()) for key in plain)
    if plain.keys() != ours.keys() or not worst < 1e-3:
        raise RuntimeError(f"{name}: plain and ours do not compute the same: they differ by {worst:.1e}")
    return worst


class Timer:
    """Each call times the next `--steps` steps of a variant, and returns images per second."""

    def __init__(self, args: argparse.Namespace, name: str, variant: Variant) -> None:
        self.args, self.variant, self.done = args, variant, 1
        set_kernels(args, variant)
        self.step = {"plain": plain_step, "ours": our_step}[variant.kind](args, name, variant)
        self.step(0)

    def __call__(self) -> float:
        set_kernels(self.args, self.variant)
        first, self.done = self.done, self.done + self.args.steps
        synchronise(self.args)
        started = time.perf_counter()
        for seed in range(first, self.done):
            self.step(seed)
        synchronise(self.args)
        return self.args.b * self.args.steps / (time.perf_counter() - started)


def peak_memory(args: argparse.Namespace, name: str, variant: Variant) -> float:
    """MB that training needs: of the GPU, or of the process beyond what its imports take."""
    torch.set_num_threads(args.threads)
    before = 0 if args.device == "cuda" else peak_mb()
    Timer(args, name, variant)()
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return peak_mb() - before


def get_parser() -> options.Parser:
    """The options of this script."""
    parser = options.Parser(__doc__)
    group = parser.add_argument_group("steps")
    group.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="what is measured")
    group.add_argument("--b", type=options.positive_int, help="images per step; 16 on a CPU, 64 on a GPU")
    group.add_argument("--image-size", type=options.positive_int, default=224, help="side of the views, pixels")
    group.add_argument("--queue", type=options.positive_int, default=16384, help="keys in the queue")
    group.add_argument("--arch", default="resnet18", help="encoder")
    group = add_measuring(parser, "contrast.json")
    group.add_argument("--steps", type=options.positive_int, help="steps timed at once; 30 on a GPU, 3 on a CPU")
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
    cuda, threads = args.device == "cuda", torch.get_num_threads()
    args = options.complete(args, {"b": 64 if cuda else 16, "steps": 30 if cuda else 3, "threads": threads})
    if args.b < 2:
        raise errors.InputError("--b 1: batch norm of single images is not possible; use 2 or more")
    torch.set_num_threads(args.threads)
    if cuda:
        make_deterministic(args.deterministic)  # before CUDA starts, which reads the setting of cuBLAS
    results, differences = {}, {}
    try:
        for name in args.methods:
            differences[name] = refuse_difference(args, name)
            print(f"{name}: plain and ours agree: losses and gradients differ by {differences[name]:.0e}")
            variants = choose_variants(cuda, args.compile)
            timers = {str(variant): Timer(args, name, variant) for variant in variants}
            measured = summarise(interleave(timers, args.repeats), str(PLAIN))
            timers.clear()
            if args.memory and (cuda or STATUS.exists()):
                for variant in variants:
                    measured[str(variant)]["peak_mb"] = alone(peak_memory, args, name, variant)
            results |= {f"{name}: {variant}": row for variant, row in measured.items()}
    finally:
        torch.set_num_threads(threads)
        if cuda:
            make_deterministic(False)
    return report(args.output, "contrast", vars(args), results, differences=differences)


def cli() -> None:
    """Command line."""
    errors.run_script(main)


if __name__ == "__main__":
    cli()
