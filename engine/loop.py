"""The training loop: one flat function, the same for pre-training and fine-tuning."""

import argparse
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl.datasets.base import ImageDataset
from medssl.engine import state as states
from medssl.engine.batches import CHANNELS_LAST, autocast, to_device, training_batches
from medssl.engine.export import export_encoder, save_views
from medssl.engine.guards import BadFiles, Clock, FiniteCheck, Stop
from medssl.engine.method import Method
from medssl.engine.monitor import Monitor
from medssl.engine.order import set_learning_rate
from medssl.engine.parallel import Devices, Run, finish, wrap
from medssl.engine.runs import alone_in, describe, open_output
from medssl.errors import InputError
from medssl.views.draws import Draws
from medssl.views.of_images import Views


def fit(
    method: Method, data: ImageDataset, views: Views, args: argparse.Namespace, devices: Devices,
    evaluate: Callable[[], dict[str, float]] | None = None, parameters: list[dict] | None = None,
    tensorboard: bool = True, before_epoch: Callable[[int], None] | None = None,
) -> dict:  # fmt: skip
    """Train `method` on `data`, continuing what is in `--output`.

    Args:
        method: moved to the device here.
        views: makes the method's batch from a batch of textures, on the device.
        args: all options.
        evaluate: called at the end of each epoch in evaluation mode, in the main process alone; returns numbers to log,
            of which "score" (higher is better) chooses the best state and, with `args.patience`, ends the run.
        parameters: optimiser groups; all parameters by default.
        before_epoch: called in every process before the first step of each epoch, with the number of steps done; may
            change the method's buffers, alike in all processes.

    Returns:
        {"step", "epoch", "best": {"score", "epoch", "state"} or None, "seconds"}.

    Raises:
        InputError: bad options or checkpoint, too many unreadable files, a loss that is not finite.
        SystemExit: after a signal; the state is saved, and the same command continues.
    """
    devices.narrow(args.b, views.patches, args.compile)
    n, rows = len(data), devices.own_rows(args.b, views.patches)
    total = max(1, round(args.epochs * n / args.b))
    last = min(total, args.steps or total)
    wrapped = prepare(method, views, data, args, devices)  # what cannot be is refused before a folder changes
    folder, saved = open_output(args, type(method).__name__, data.digest, devices)
    state = states.start(method, data, args, devices, folder, saved, parameters)
    if state.over or state.step >= last:
        return outcome(state, total, evaluate, views, devices, None, 0.0)

    monitor = Monitor(folder, last, state.step, args.log_every, state.name, tensorboard) if devices.main else None
    closing = contextlib.closing(monitor) if monitor else contextlib.nullcontext()
    finite, clock = FiniteCheck(folder, data.ids, devices), Clock()
    bad = BadFiles(folder, args.max_bad, data.files)
    with closing, Stop() as stop, training_batches(data, args, devices, rows, state.step, last) as batches:
        while state.step < last and not state.over:
            # data
            if before_epoch and state.starts_epoch():
                before_epoch(state.step)
            batch = clock.next_of(batches)
            bad.note(batch["bad"])

            set_learning_rate(state.optimizer, args, state.epoch)

            # views
            generator = devices.seed_step(args.seed, state.step)
            draws = Draws((args.seed, state.step), args.b, rows.start, len(batch["index"]))
            method.train()
            views.train()
            with torch.no_grad():
                inputs = views(to_device(batch, devices.device), draws)
            if monitor and state.step == 0:
                save_views(method, inputs, views, folder / "samples" / "step_0000000.png")

            # losses
            with autocast(args, devices.device):
                losses = wrapped(inputs, Run(devices.device_ids, generator))
            loss = sum(losses.values())
            finite.note(state.step, batch["index"], losses)

            # backward
            state.optimizer.zero_grad(set_to_none=True)
            logs = (state.step + 1) % args.log_every == 0 or state.step + 1 == last
            shares = gradients_of(method, losses) if logs and getattr(args, "log_gradients", False) else {}
            state.scaler.scale(loss).backward()
            norm = clip_gradients(state, args.clip_grad) if args.clip_grad or logs else None
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.step += 1
            method.after_step(state.step / total)

            # log
            if monitor:
                monitor.tick(args.b, clock.waited)
            if logs:
                log(state, loss, losses, norm, shares, monitor, devices)

            # validate
            if evaluate and state.ends_epoch(total):
                state.keep(validate(state, evaluate, views, devices, monitor), args.patience)

            # checkpoint
            stopped, late = devices.any(stop.signal is not None), devices.any(clock.late())
            if state.step % args.save_every == 0 or state.step == last or state.over or stopped or late:
                finite.before_checkpoint(method, state.step)
                if devices.main:
                    state.save(folder / "last.pt")
                clock.saved()
                if monitor and (state.step == last or state.step % args.save_every == 0) and not state.over:
                    save_views(method, inputs, views, folder / "samples" / f"step_{state.step:07d}.png")
            if stopped and state.step < last and not state.over:
                if devices.main:
                    print(f"stopped after step {state.step}; state saved, the same command continues", flush=True)
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
        seconds = clock.seconds()
        return outcome(state, total, evaluate, views, devices, monitor, seconds)


def prepare(
    method: Method, views: Views, data: ImageDataset, args: argparse.Namespace, devices: Devices
) -> nn.Module:  # fmt: skip
    """Bring method and views to the device; returns what a step calls, compiled and parallel as asked."""
    if args.compile and len(devices.device_ids) > 1:
        raise InputError("--compile and several --gpus in one process exclude each other; use torchrun")
    method.to(devices.device, memory_format=CHANNELS_LAST[data.info.dims])
    views.to(devices.device)
    if args.compile:
        # Decoder blocks share their code and see large and small views: more shapes than torch allows by default.
        torch._dynamo.config.cache_size_limit = 64  # recompile_limit, by the name that torch 2.6 has too
        for part in method.compiled_parts():
            part.compile()
    return wrap(method, devices, method.find_unused, method.sync_batch_norm)


def gradients_of(method: Method, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norm of each loss's gradient in the encoder, () each, of this process's images: which of them it learns from.
    Each takes a backward pass of its own."""
    encoder = method.encoder_parameters()
    norms = {}
    for name, value in losses.items():
        if value.requires_grad:
            found = torch.autograd.grad(value, encoder, retain_graph=True, allow_unused=True)
            norms[f"gradient_{name}"] = nn.utils.get_total_norm([part for part in found if part is not None])
    return norms


def clip_gradients(state: states.State, largest: float) -> Tensor:
    """The gradients' norm, (), before they are clipped to `largest` (0: not clipped)."""
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in state.method.parameters() if p.grad is not None])
    if largest:
        nn.utils.clip_grads_with_norm_(state.method.parameters(), largest, norm)
    return norm


def log(
    state: states.State, loss: Tensor, losses: dict[str, Tensor], norm: Tensor, shares: dict[str, Tensor],
    monitor: Monitor | None, devices: Devices,
) -> None:  # fmt: skip
    """A line of numbers: the losses' means over the processes, learning rate, gradient norm, and of `gradients_of`."""
    means = devices.mean(torch.stack([loss.detach(), *(value.detach() for value in losses.values())])).tolist()
    values = dict(zip(["loss", *losses], means))
    values |= {"lr": state.optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
    values |= {name: float(share) for name, share in shares.items()}
    if monitor:
        monitor.log(state.step, state.epoch, values, state.method.features, state.method.embeddings)


def validate(
    state: states.State, evaluate: Callable[[], dict[str, float]], views: Views, devices: Devices,
    monitor: Monitor | None,
) -> dict:  # fmt: skip
    """Judge the weights as they are, in the main process: {"score", "epoch"}, the same in all."""
    scores: dict[str, float] = {}
    if devices.main:
        state.method.eval()
        views.eval()
        scores = evaluate()
        if monitor:
            monitor.write({"step": state.step, "epoch": round(state.epoch, 4), **scores})
            monitor.start_window()
    return states.judged(devices.broadcast(scores), state)


def outcome(
    state: states.State, total: int, evaluate: Callable[[], dict[str, float]] | None, views: Views, devices: Devices,
    monitor: Monitor | None, seconds: float,
) -> dict:  # fmt: skip
    """What `fit` returns. `--steps` may stop within an epoch: that state is judged too, but the run's own record, by
    which it continues, knows nothing of it."""
    best = state.best
    if evaluate and not state.over and not state.ends_epoch(total):
        judged = validate(state, evaluate, views, devices, monitor)
        best = state.snapshot(judged) if state.is_best(judged) else best
    return {"step": state.step, "epoch": state.epoch, "best": best, "seconds": seconds}


def pretrain(
    method: Method, data: ImageDataset, views: Views, args: argparse.Namespace, devices: Devices,
    evaluate: Callable[[], dict[str, float]] | None = None, before_epoch: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Train a method without labels, then export its encoder: with `evaluate`, as `fit` has it, the best one."""
    data.labels = None  # a pre-training run cannot see them, not even by mistake
    if devices.main:
        print(f"{type(method).__name__}: {len(data)} images of {data.info.name} on {describe(devices)}", flush=True)
    with alone_in(args.output, devices):
        report = fit(method, data, views, args, devices, evaluate, before_epoch=before_epoch)
        if report["best"]:
            method.load_state_dict(report["best"]["state"])
        if devices.main:
            export_encoder(method, views, args, data.info, Path(args.output))
    if devices.main:
        speed = f", {report['seconds']:.0f} s" if report["seconds"] else " (was complete)"
        print(f"done: {report['step']} steps{speed}; encoder in {args.output}/encoder.pt", flush=True)
    finish()
