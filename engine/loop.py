"""The training loop: one flat function, the same for pre-training and fine-tuning."""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm.optim
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import medssl
from medssl.datasets.registry import ImageDataset, collate
from medssl.datasets.views import Draws, Views, denormalise
from medssl.engine.checkpoint import FORMAT_VERSION, load_safe, save_atomic
from medssl.engine.monitor import Monitor, middle_slices, save_pictures, stretch
from medssl.engine.options import InputError, decoders
from medssl.engine.parallel import Devices, Run, finish, wrap

# Seconds after which a checkpoint is written even when --save-every is far: slow machines lose no more.
LONGEST_UNSAVED = 300

# Memory layout of networks, by spatial dimensions: what convolutions are fastest in.
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

# Options that may differ between a run and its continuation: none of them changes a result. Data may move, but not
# change, which their digest tells, with a message of its own.
FREE_OPTIONS = {
    "output", "resume", "steps", "workers", "cache", "max_bad", "gpus", "device", "save_every", "log_every",
    "data", "data_digest", "compile", "trials",
}  # fmt: skip

OR_RESUME = "another --output, or --resume never"


class Method(nn.Module):
    """What is trained. Its networks are attributes; everything that must survive a restart is in its state dict.

    Attributes:
        sync_batch_norm: whether batch norms share their statistics under DistributedDataParallel on GPUs.
        find_unused: whether a step may leave parameters without gradient (DistributedDataParallel asks).
        features: (B, C) of the last forward, before any batch norm, for the collapse alarm.
        embeddings: (B, D) of the last forward, which are contrasted, of one view of each image, for the same alarm.
    """

    sync_batch_norm = False
    find_unused = False
    features: Tensor | None = None
    embeddings: Tensor | None = None

    def forward(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Named, already weighted, scalar losses, whose sum is minimised. Changes nothing but batch-norm statistics."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Momentum networks, queues and annealed weights change here. `progress` is the share of the run done."""

    def encoder_state(self) -> dict[str, Tensor]:
        """What fine-tuning loads."""
        raise NotImplementedError

    def decoder_state(self) -> dict[str, Tensor] | None:
        """The decoder, where it lies beside the encoder and segmentation can start from it (one with skips)."""
        return None

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name → normalised images (N, 3, H, W), or volumes (N, 1, X, Y, Z) in [0, 1] or normalised, that show what
        is learned from; by default, the views."""
        return {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim in (4, 5)}

    def compiled_parts(self) -> list[nn.Module]:
        """Networks that `--compile` compiles, each called with inputs of few shapes."""
        return list(self.children())


# Order and schedule --------------------------------------------------------------------------------


class Order:
    """The order of images: epochs' permutations, one after the other, cut into batches of equal size.

    Step s takes places s·B to (s+1)·B − 1 of that stream, so every image is seen once an epoch, no batch is
    short, and any step can be found without those before it. Indices are those of this process.

    Args:
        count: images N. batch: images per step B, over all processes. share: this process's rows.
        seed: epoch e is permuted by (seed, e).
    """

    def __init__(self, count: int, batch: int, share: slice, seed: int, start: int, stop: int) -> None:
        self.count, self.batch, self.share, self.seed = count, batch, share, seed
        self.start, self.stop = start, stop
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count))
        return self._permutation[1]

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            places = range(step * self.batch, (step + 1) * self.batch)
            yield [int(self._epoch(p // self.count)[p % self.count]) for p in places][self.share]


def learning_rate(args: argparse.Namespace, epoch: float) -> float:
    """The learning rate at a (fractional) epoch, as `--schedule`, `--warmup-epochs` and `--milestones` say."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    if args.schedule == "cosine":
        span = max(args.epochs - args.warmup_epochs, 1e-9)
        return args.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - args.warmup_epochs) / span)))
    if args.schedule == "step":
        return args.lr * args.gamma ** sum(epoch >= m for m in args.milestones)
    return args.lr


def make_optimizer(parameters: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD, LARS, Adam or AdamW over the parameters."""
    if args.optimizer == "lars":
        # Biases and the weights of norms neither decay nor have their step adapted (BYOL, arXiv 2006.07733, §3.3).
        groups = [
            {**group, "params": [p for p in group["params"] if (p.ndim > 1) == large], **more}
            for group in parameters
            for large, more in ((True, {"always_adapt": True}), (False, {"weight_decay": 0.0}))
        ]
        groups = [group for group in groups if group["params"]]
        return timm.optim.Lars(groups, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    if args.optimizer == "sgd":
        # Not fused: torch's fused SGD fails when a parameter gets its first gradient later than others,
        # as the heads of decoder levels do.
        return torch.optim.SGD(parameters, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(parameters, args.lr, betas=tuple(args.betas), weight_decay=args.weight_decay, fused=True)


def seed_step(seed: int, step: int, rank: int) -> torch.Generator:
    """Seed torch's generators for a step; returns one that is the same in every process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 1]).generate_state(1)[0]))
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, 2]).generate_state(1)[0]))


# Inputs and devices --------------------------------------------------------------------------------


def to_device(batch: dict, device: torch.device) -> dict:
    """Move images and labels, also lists of volumes; sizes stay on the CPU, where views are drawn."""

    def move(value: object) -> object:
        if isinstance(value, list):
            return [move(entry) for entry in value]
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {key: value if key == "size" else move(value) for key, value in batch.items()}


def autocast(args: argparse.Namespace, device: torch.device) -> contextlib.AbstractContextManager:
    """Mixed precision as `--amp` and `--amp-dtype` say."""
    if not args.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if args.amp_dtype == "bf16" else torch.float16)


class BadFiles:
    """Counts unreadable files, names them in bad_files.txt, and stops a run that has too many.

    Args:
        limit: largest share of failed reads. count: images in the set; nothing is judged before one epoch or
            1000 reads.
    """

    def __init__(self, folder: Path, limit: float, count: int) -> None:
        self.path, self.limit, self.enough = folder / "bad_files.txt", limit, min(count, 1000)
        self.reads = self.failed = 0
        self.known = set(self.path.read_text().splitlines()) if self.path.exists() else set()

    def note(self, bad: list[str], reads: int) -> None:
        """Add one batch's reads; raises InputError above the limit."""
        self.reads, self.failed = self.reads + reads + len(bad), self.failed + len(bad)
        new = sorted(set(bad) - self.known)
        if new:
            self.known.update(new)
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in new)
        if self.reads >= self.enough and self.failed > self.limit * self.reads:
            raise InputError(
                f"{self.failed} of {self.reads} reads failed, more than --max-bad {self.limit:g} allows; "
                f"see {self.path}, and preprocess/check_data.py"
            )


def ignore_signals(_worker: int) -> None:
    """Decoding processes leave signals to the training process.

    Schedulers and terminals send SIGTERM and SIGINT to the whole group; a worker that died of it would break the
    step that is being finished. Workers end with their parent, however that ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Stop:
    """Notes SIGTERM and SIGINT while a run is under way; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: object) -> None:
        self.signal = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# Continuing ----------------------------------------------------------------------------------------


def open_output(args: argparse.Namespace, method_name: str, devices: Devices) -> tuple[Path, dict | None]:
    """Make the output folder, find the checkpoint to continue, and write config.json.

    Raises:
        InputError: when the folder holds another method's run, or one with other options.
    """
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if devices.main:
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink()
        for unfinished in folder.glob(".*.tmp"):  # left by a kill in the middle of a write
            unfinished.unlink(missing_ok=True)
    devices.wait()
    source = folder / "last.pt" if args.resume == "auto" else Path(args.resume)
    saved = None
    if args.resume != "never" and (args.resume != "auto" or source.exists()):
        saved = load_safe(source)
        if not isinstance(saved, dict) or "config" not in saved or "step" not in saved:
            raise InputError(f"--resume {source}: not a checkpoint that can be continued")
        if saved["name"] != method_name:
            raise InputError(f"{source}: a run of {saved['name']}, not {method_name}; choose another --output")
        refuse_changes(saved["config"], args, source)
    if devices.any((saved or {}).get("step", 0) != devices.broadcast((saved or {}).get("step", 0))):
        raise InputError(f"--output {folder}: not the same files on every machine; use a shared file system")
    if devices.main:
        if saved is None:
            # Files of an earlier run that --resume never replaces; their lines would mix with the new ones.
            for name in ("last.pt", "encoder.pt", "metrics.jsonl", "bad_files.txt", "warnings.txt"):
                (folder / name).unlink(missing_ok=True)
            for name in ("samples", "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
        config = {"method": method_name, **plain(args), "versions": versions(), "device": describe(devices)}
        write_json(folder / "config.json", config)
    return folder, saved


def refuse_changes(before: dict, args: argparse.Namespace, where: Path, instead: str = OR_RESUME) -> None:
    """Raise InputError when an option that changes results, or the data, differ from what a run was started with;
    `instead` says what else than the same can be done."""
    # Runs without a digest are older than digests.
    if before.get("data_digest") not in (None, getattr(args, "data_digest", None)):
        raise InputError(
            f"{where}: was started with other data: images, their order, lists or labels differ; use the same data, "
            + instead
        )
    for key, value in plain(args).items():
        # An option that the run did not know is newer than it.
        if key in before and key not in FREE_OPTIONS and before[key] != value:
            raise InputError(
                f"{where}: was started with {key} {before.get(key)}, now {value}; use the same value, {instead}"
            )


def write_json(path: Path, content: object) -> None:
    """Write indented JSON so that `path` always holds a complete file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def plain(args: argparse.Namespace) -> dict:
    """Options as JSON values."""
    return json.loads(json.dumps(vars(args), default=str))


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"medssl": medssl.__version__, "torch": torch.__version__, "python": platform.python_version()}


def describe(devices: Devices) -> str:
    """The device in words."""
    if devices.device.type == "cuda":
        return f"{torch.cuda.get_device_name(devices.device)} × {max(len(devices.device_ids), devices.world)}"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


# The loop ------------------------------------------------------------------------------------------


def fit(
    method: Method,
    data: ImageDataset,
    views: Views,
    args: argparse.Namespace,
    devices: Devices,
    evaluate: Callable[[], dict[str, float]] | None = None,
    parameters: list[dict] | None = None,
    tensorboard: bool = True,
    before_epoch: Callable[[int], None] | None = None,
) -> dict:
    """Train `method` on `data`, continuing what is in `--output`.

    Args:
        method: moved to the device here.
        views: makes the method's batch from a batch of textures, on the device.
        args: all options.
        evaluate: called at the end of each epoch in evaluation mode; returns numbers to log, of which "score"
            (higher is better) chooses the best state and, with `args.patience`, ends the run. Only the main
            process calls it.
        parameters: optimiser groups; all parameters by default.
        before_epoch: called in every process before the first step of each epoch, with the number of steps done; may
            change the method's buffers, alike in all processes.

    Returns:
        {"step", "epoch", "best": {"score", "epoch", "state"} or None, "seconds"}.

    Raises:
        InputError: bad options or checkpoint, too many unreadable files, a loss that is not finite.
        SystemExit: after a signal; the state is saved, and the same command continues.
    """
    device, n = devices.device, len(data)
    name = type(method).__name__
    share = devices.share(args.b, views.patches)
    total = max(1, round(args.epochs * n / args.b))
    if args.compile and len(devices.device_ids) > 1:
        raise InputError("--compile and several --gpus in one process exclude each other; use torchrun")
    folder, saved = open_output(args, name, devices)
    method.to(device, memory_format=CHANNELS_LAST[data.info.dims])
    views.to(device)
    parameters = parameters or [{"params": [p for p in method.parameters() if p.requires_grad]}]
    optimizer = make_optimizer(parameters, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "fp16")
    step, best, since_best, over = 0, None, 0, False
    bad = BadFiles(folder, args.max_bad, n)
    if saved is not None:
        try:
            method.load_state_dict(saved["method"])
            optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: its checkpoint does not fit: {str(error).splitlines()[0]}") from None
        scaler.load_state_dict(saved["scaler"])
        step, best, since_best, over = (saved[key] for key in ("step", "best", "since_best", "over"))
        bad.reads, bad.failed = saved["reads"], saved["failed"]
        if saved["images"] != n:
            raise InputError(f"{folder}: the data set had {saved['images']} images, now {n}; use another --output")
    last = min(total, args.steps or total)

    def ends_epoch(step: int) -> bool:
        return step * args.b // n > (step - 1) * args.b // n or step == total

    def validated() -> dict:
        """The state after this step, and its score."""
        scores = {}
        if devices.main:
            method.eval()
            views.eval()
            scores = evaluate()
            if monitor:
                monitor.write({"step": step, "epoch": round(step * args.b / n, 4), **scores})
                monitor.start_window()
        scores = devices.broadcast(scores)
        score = scores["score"] if math.isfinite(scores["score"]) else -math.inf
        return {"score": score, "epoch": step * args.b / n}

    def with_state(candidate: dict) -> dict:
        return {**candidate, "state": {k: v.detach().cpu().clone() for k, v in method.state_dict().items()}}

    def better(candidate: dict) -> bool:
        return best is None or candidate["score"] > best["score"]

    def report(seconds: float) -> dict:
        chosen = best
        # `--steps` may stop within an epoch: that state is judged too, but the run's own record, by which it
        # continues, knows nothing of it.
        if evaluate and not over and not ends_epoch(step):
            candidate = validated()
            chosen = with_state(candidate) if better(candidate) else best
        return {"step": step, "epoch": step * args.b / n, "best": chosen, "seconds": seconds}

    monitor = None
    if over or step >= last:
        return report(0.0)
    if args.compile:
        # Decoder blocks share their code and see large and small views: more shapes than torch allows by default.
        torch._dynamo.config.recompile_limit = 64
        for part in method.compiled_parts():
            part.compile()
    wrapped = wrap(method, devices, method.find_unused, method.sync_batch_norm)
    loader = DataLoader(
        data,
        batch_sampler=Order(n, args.b, share, args.seed, step, last),
        num_workers=decoders(args),
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if args.workers else None,
    )
    if devices.main:
        monitor = Monitor(folder, last, step, args.log_every, name, tensorboard)
    pending: list[tuple[int, list[int], list[str], Tensor, object]] = []

    def check_finite(everything: bool) -> None:
        # On a GPU the values are copied beside the work, and looked at when the next step has been launched:
        # waiting for the copy's event does not wait for that step, so the device never idles.
        while len(pending) > (0 if everything or device.type == "cpu" else 1):
            at, indices, names, values, copied = pending.pop(0)
            if copied is not None:
                copied.synchronize()
            if not bool(torch.isfinite(values).all()):
                report = {
                    "step": at,
                    "losses": {k: repr(v) for k, v in zip(names, values.tolist())},
                    "ids": [data.ids[i] for i in indices],
                }
                (folder / f"non_finite_{devices.rank}.json").write_text(json.dumps(report, indent=1))
                raise InputError(
                    f"the loss is not finite at step {at} ({report['losses']}); its images are listed in "
                    f"{folder}/non_finite_{devices.rank}.json; lower --lr or use --clip-grad"
                )

    def save() -> None:
        # A finite loss can still have had a gradient that was not: such weights must not replace good ones.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        healthy = all(bool(torch.isfinite(entry[3]).all()) for entry in pending)
        healthy = healthy and all(bool(torch.isfinite(p).all()) for p in method.parameters())
        broken = devices.any(not healthy)
        check_finite(everything=True)
        if broken:
            raise InputError(
                f"the weights are not finite after step {step}; the last checkpoint is from before; "
                "lower --lr or use --clip-grad"
            )
        if not devices.main:
            return
        content = {
            "name": name, "method": method.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "step": step, "best": best, "since_best": since_best, "over": over,
            "reads": bad.reads, "failed": bad.failed, "images": n, "config": plain(args),
            "version": FORMAT_VERSION,
        }  # fmt: skip
        save_atomic(content, folder / "last.pt")

    started = saved_at = time.perf_counter()
    with Stop() as stop, contextlib.closing(monitor) if monitor else contextlib.nullcontext():
        batches = iter(loader)
        while step < last and not over:
            if before_epoch and (step == 0 or step * args.b // n > (step - 1) * args.b // n):
                before_epoch(step)
            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited
            bad.note(batch["bad"], len(batch["index"]))
            generator = seed_step(args.seed, step, devices.rank)
            epoch = step * args.b / n
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch) * group.get("lr_scale", 1.0)

            method.train()
            views.train()
            draws = Draws((args.seed, step), args.b, share.start, len(batch["index"]))
            with torch.no_grad():
                inputs = views(to_device(batch, device), draws)
            if monitor and step == 0:
                save_views(method, inputs, views, folder / "samples" / "step_0000000.png")
            with autocast(args, device):
                losses = wrapped(inputs, Run(devices.device_ids, generator))
            loss = sum(losses.values())
            values, copied = torch.stack([*losses.values()]).detach(), None
            if device.type == "cuda":
                values, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
                copied.record()
            pending.append((step, batch["index"].tolist(), list(losses), values, copied))
            check_finite(everything=False)

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            logs = (step + 1) % args.log_every == 0 or step + 1 == last
            grad_norm = None
            if args.clip_grad or logs:
                scaler.unscale_(optimizer)
                gradients = [p.grad for p in method.parameters() if p.grad is not None]
                grad_norm = nn.utils.get_total_norm(gradients)
                if args.clip_grad:
                    nn.utils.clip_grads_with_norm_(method.parameters(), args.clip_grad, grad_norm)
            scaler.step(optimizer)
            scaler.update()
            step += 1
            method.after_step(step / total)

            if monitor:
                monitor.tick(args.b, waited)
            if logs:
                means = devices.mean(torch.stack([loss.detach(), *(v.detach() for v in losses.values())])).tolist()
                values = dict(zip(["loss", *losses], means))
                values |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": float(grad_norm)}
                if monitor:
                    monitor.log(step, step * args.b / n, values, method.features, method.embeddings)
            if evaluate and ends_epoch(step):
                candidate = validated()
                since_best += 1
                if better(candidate):
                    best, since_best = with_state(candidate), 0
                over = bool(args.patience) and since_best >= args.patience
            stopped = devices.any(stop.signal is not None)
            late = devices.any(time.perf_counter() - saved_at > LONGEST_UNSAVED)
            if step % args.save_every == 0 or step == last or over or stopped or late:
                save()
                saved_at = time.perf_counter()
                if monitor and (step == last or step % args.save_every == 0) and not over:
                    save_views(method, inputs, views, folder / "samples" / f"step_{step:07d}.png")
            if stopped and step < last and not over:
                if devices.main:
                    print(f"stopped after step {step}; state saved, the same command continues", flush=True)
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        seconds = time.perf_counter() - started
        return report(seconds)


def save_views(method: Method, inputs: dict[str, Tensor], views: Views, path: Path) -> None:
    """Write a picture of what the method sees, without changing it (evaluation mode, no gradient)."""
    was_training = method.training
    method.eval()
    with torch.no_grad():
        rows = method.pictures(inputs)
    method.train(was_training)
    images = {name: x.float() for name, x in rows.items()}
    if not views.mean:  # volumes, each normalised by itself
        save_pictures({name: middle_slices(stretch(x)) for name, x in images.items()}, path, columns=4)
    else:
        save_pictures({name: denormalise(x, views.mean, views.std) for name, x in images.items()}, path)


def export_encoder(method: Method, views: Views, args: argparse.Namespace, info: object, folder: Path) -> None:
    """Write `encoder.pt`, what fine-tuning and other tools load."""

    def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().cpu().contiguous() for k, v in state.items()}

    decoder = method.decoder_state()
    content = {
        "state_dict": plain_state(method.encoder_state()),
        **({} if decoder is None else {"decoder_state_dict": plain_state(decoder)}),
        "arch": args.arch,
        "dims": info.dims,
        "channels": 3 if info.dims == 2 else 1,
        "method": type(method).__name__,
        "normalization": {"mean": list(views.mean), "std": list(views.std)} if info.dims == 2 else {"kind": views.kind},
        "version": FORMAT_VERSION,
    }
    save_atomic(content, folder / "encoder.pt")


def pretrain(
    method: Method,
    data: ImageDataset,
    views: Views,
    args: argparse.Namespace,
    devices: Devices,
    evaluate: Callable[[], dict[str, float]] | None = None,
    before_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train a method without labels, then export its encoder: with `evaluate`, as `fit` has it, the best one."""
    data.labels = None  # a pre-training run cannot see them, not even by mistake
    if devices.main:
        print(f"{type(method).__name__}: {len(data)} images of {data.info.name} on {describe(devices)}", flush=True)
    report = fit(method, data, views, args, devices, evaluate, before_epoch=before_epoch)
    if report["best"]:
        method.load_state_dict(report["best"]["state"])
    if devices.main:
        export_encoder(method, views, args, data.info, Path(args.output))
        speed = f", {report['seconds']:.0f} s" if report["seconds"] else " (was complete)"
        print(f"done: {report['step']} steps{speed}; encoder in {args.output}/encoder.pt", flush=True)
    finish()
