"""What a run says while it runs: `metrics.jsonl`, TensorBoard, a progress bar, warnings, pictures."""

import io
import json
import math
import os
import resource
import socket
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from medssl.files import append_bytes, append_text, read_lines, write_atomic, write_text

COLLAPSED = 0.01
ALIKE = 0.99
PATIENCE = 3


def feature_std(features: Tensor) -> float:
    """How much embeddings differ between the images of a batch.

    Each row is scaled to unit length; the result is √C × the mean over the C entries of their standard
    deviation over the batch: 1 for directions spread evenly, 0 when all images share one embedding.

    Args:
        features: (B, C); the embedding *before* any batch norm, which would hide a collapse.
    """
    rows = torch.nn.functional.normalize(features.detach().float(), dim=1)
    return float(rows.std(0, unbiased=False).mean() * math.sqrt(rows.shape[1]))


def similarity(embeddings: Tensor) -> float:
    """Mean cosine between the embeddings (B, D) of different images, B at least 2: near 0 for directions spread evenly,
    1 where all point the same way."""
    rows = torch.nn.functional.normalize(embeddings.detach().float(), dim=1)
    b = len(rows)
    return float((rows.sum(0).square().sum() - b) / (b * (b - 1)))


def trim_metrics(path: Path, steps_done: int) -> None:
    """Drop the lines of steps that a checkpoint at `steps_done` does not hold; they will be done again."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if isinstance(line.get("step"), int) and line["step"] <= steps_done]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def loss_names(lines: list[dict]) -> list[str]:
    """The losses in lines of metrics.jsonl, which stand in each between their sum and the learning rate."""
    names: dict[str, None] = {}
    for line in lines:
        if "loss" in line and "lr" in line:
            keys = list(line)
            names |= dict.fromkeys(keys[keys.index("loss") + 1 : keys.index("lr")])
    return list(names)


class Events:
    """TensorBoard's file of a run's numbers. torch's SummaryWriter has a thread, which fails with a trace of its own.

    Args:
        folder: gets the file.
        done: steps done before; TensorBoard forgets the later ones, which are done again.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self.path = folder / name
        self._add(file_version="brain.Event:2")
        if done:
            self._add(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add numbers by their names."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(step=step, summary=Summary(value=values))

    def _add(self, **fields: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        append_bytes(self.path, record.getvalue())


class Monitor:
    """Writes a run's numbers; one per run, in the main process.

    Args:
        folder: where `metrics.jsonl` and the TensorBoard events go.
        total: steps of the whole run.
        done: steps done before (a continued run).
        log_every: steps between two lines.
        tensorboard: write TensorBoard events too.
    """

    def __init__(
        self, folder: Path, total: int, done: int, log_every: int, name: str, tensorboard: bool = True
    ) -> None:
        self.folder, self.log_every = folder, log_every
        trim_metrics(folder / "metrics.jsonl", done)
        self.events = Events(folder / "tensorboard", done) if tensorboard else None
        self.bar = tqdm(total=total, initial=done, desc=name, disable=not sys.stderr.isatty(), leave=False)
        self.flat_logs = self.alike_logs = 0
        self.wrote = False
        self.start_window()

    def start_window(self) -> None:
        """Begin counting speed and waiting time anew."""
        self.since, self.waited, self.images = time.perf_counter(), 0.0, 0

    def tick(self, images: int, waited: float) -> None:
        """Note one step: its images, and the seconds spent waiting for them."""
        self.images, self.waited = self.images + images, self.waited + waited
        self.bar.update(1)

    def log(
        self,
        step: int,
        epoch: float,
        values: dict[str, float],
        features: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> None:
        """Write one line. `step` counts steps done; `values` are losses, lr and grad_norm."""
        line = {"step": step, "epoch": round(epoch, 4), **values}
        if features is not None and len(features) > 1:
            line["feature_std"] = feature_std(features)
            self.flat_logs = self.flat_logs + 1 if line["feature_std"] < COLLAPSED else 0
            if self.flat_logs == PATIENCE:
                self.warn(
                    f"step {step}: all images have nearly the same features (feature_std "
                    f"{line['feature_std']:.4f}); the network may have collapsed: lower --lr or look at samples/"
                )
        if embeddings is not None and len(embeddings) > 1:
            line["similarity"] = similarity(embeddings)
            self.alike_logs = self.alike_logs + 1 if line["similarity"] > ALIKE else 0
            if self.alike_logs == PATIENCE:
                self.warn(
                    f"step {step}: the embeddings of different images point the same way (similarity "
                    f"{line['similarity']:.4f}), where contrast hardly parts them; if the loss stays at "
                    "chance, start again with --warmup-epochs 1 or a lower --lr"
                )
        seconds = time.perf_counter() - self.since
        if self.images:
            line["images_per_s"] = round(self.images / seconds, 2)
            line["data_wait"] = round(self.waited / seconds, 4)
        if torch.cuda.is_initialized():
            line["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        else:  # of the training process, without the decoding ones
            line["peak_memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        self.write(line)
        shown = {key: f"{line[key]:.4g}" for key in ("loss", "lr", "images_per_s") if key in line}
        self.bar.set_postfix(shown)
        if not sys.stderr.isatty() and step % (10 * self.log_every) == 0:
            print(f"step {step}/{self.bar.total} " + " ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
        self.start_window()

    def write(self, line: dict) -> None:
        """Append a line to metrics.jsonl and TensorBoard."""
        # JSON has no inf or NaN, which a gradient norm is where fp16's loss scaling skips a step.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        path = self.folder / "metrics.jsonl"
        if self.wrote and not path.exists():
            self.wrote = False
            self.warn(f"step {line['step']}: {path} was removed while the run goes on; its lines before are lost")
        append_text(path, json.dumps(finite) + "\n")
        self.wrote = True
        if self.events is not None:
            numbers = {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
            self.events.write(line["step"], numbers)

    def warn(self, text: str) -> None:
        """Say something that needs looking at, above the progress bar, and keep it in warnings.txt."""
        tqdm.write(f"warning: {text}", file=sys.stderr)
        append_text(self.folder / "warnings.txt", text + "\n")

    def close(self) -> None:
        """Remove the progress bar."""
        self.bar.close()


def stretch(volumes: Tensor) -> Tensor:
    """Volumes (N, C, X, Y, Z) as shown: those of a batch in [0, 1] as they are, others (normalised to zero mean)
    each from its 0.5 to its 99.5 percentile, in float32."""
    if float(volumes.min()) >= 0 and float(volumes.max()) <= 1:
        return volumes
    ordered = volumes.detach().float().flatten(1).sort(1).values
    low, high = (ordered[:, round(share * (ordered.shape[1] - 1))] for share in (0.005, 0.995))
    low, high = (t.view(-1, *[1] * (volumes.ndim - 1)) for t in (low, high))
    return ((volumes - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def middle_slices(volumes: Tensor, gap: int = 1) -> Tensor:
    """The middle axial, coronal and sagittal slices side by side, as radiologists look at them.

    The patient's left is on the right of axial and coronal slices, the front on the left of sagittal ones; the
    front is up in axial slices, the head in the others.

    Args:
        volumes: (N, C, X, Y, Z), axes towards the patient's left, back and head.
        gap: white columns between two slices.

    Returns:
        (N, C, max(Y, Z), 2·X + Y + 2·gap), a voxel a pixel.
    """
    x, y, z = (n // 2 for n in volumes.shape[2:])
    axial, coronal, sagittal = volumes[..., z], volumes[..., y, :], volumes[:, :, x]
    # Rows are the second axis of each slice; z counts from the feet, pictures from the top.
    panels = [axial.mT, coronal.mT.flip(2), sagittal.mT.flip(2)]
    height = max(panel.shape[2] for panel in panels)
    panels = [F.pad(p, (0, gap * (i < 2), 0, height - p.shape[2]), value=1.0) for i, p in enumerate(panels)]
    return torch.cat(panels, 3)


def save_pictures(rows: dict[str, Tensor], path: Path, columns: int = 8, side: int = 128) -> None:
    """Write a labelled grid: one row per name, one column per image.

    Args:
        rows: name → (N, 1 or 3, H, W) in [0, 1].
        side: height at which each image is drawn, in pixels; its width follows.
    """
    margin = 92
    columns = min(columns, max(len(images) for images in rows.values()))
    widths = {name: round(side * images.shape[3] / images.shape[2]) for name, images in rows.items()}
    width = max(widths.values())
    sheet = Image.new("RGB", (margin + columns * (width + 2), len(rows) * (side + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (name, images) in enumerate(rows.items()):
        draw.text((6, r * (side + 2) + side // 2 - 6), name, fill="black")
        pixels = images[:columns].detach().float().cpu().clamp(0, 1).mul(255).round().byte()
        for c, image in enumerate(pixels):
            tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            tile = tile.resize((widths[name], side), Image.Resampling.BILINEAR)
            sheet.paste(tile, (margin + c * (width + 2), r * (side + 2)))
    write_atomic(path, sheet.save)
