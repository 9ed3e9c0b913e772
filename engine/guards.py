"""What keeps a run from going wrong in silence: unreadable files, losses that are not finite, signals, and time."""

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from medssl.engine.parallel import Devices
from medssl.errors import InputError
from medssl.files import append_text, write_json
from medssl.markup import one_line

# Seconds after which a checkpoint is written even when --save-every is far.
LONGEST_UNSAVED = 300


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@cache
def _lines_at_start(path: Path) -> int:
    """Lines of a file when this process first asked."""
    return len(_lines(path))


class BadFiles:
    """Names unreadable files in bad_files.txt, and stops a run that meets too many.

    Files are judged, not reads: each counts once, against all files of the set, so that the same set is refused or not
    whatever part of a pass was read, and how often. Splits, and processes, of one run tell each other through
    bad_files.txt; what earlier runs have left there may have been mended since, and does not count.

    Args:
        limit: largest share of files that may be unreadable. count: files in the set, of all splits.
    """

    def __init__(self, folder: Path, limit: float, count: int) -> None:
        self.path, self.limit, self.count = folder / "bad_files.txt", limit, count
        self.before = _lines_at_start(self.path)
        self.met: set[str] = set()  # lines

    def note(self, bad: list[str]) -> None:
        """Add the unreadable files of one batch, as lines; raises InputError above the limit."""
        bad = [one_line(line) for line in bad]
        if self.met.issuperset(bad):
            return
        lines = _lines(self.path)
        new = sorted(set(bad) - set(lines))
        append_text(self.path, "".join(line + "\n" for line in new))
        self.met |= {*bad, *lines[self.before :]}
        files = len({line.partition(": ")[0] for line in self.met})  # one may be unreadable for several reasons
        if files / self.count > self.limit:  # exactly the limit is allowed
            raise InputError(
                f"{files} of {self.count} files cannot be read, more than --max-bad {self.limit:g} allows; "
                f"see {self.path}, and preprocess/check_data.py"
            )


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


class FiniteCheck:
    """Stops a run before a loss or a weight that is not finite is saved.

    On a GPU the losses are copied beside the work, and looked at when the next step has been launched: waiting for a
    copy's event does not wait for that step, so the device never idles.

    Args:
        folder: where the losses and images of such a step are written.
        ids: of the images.
    """

    def __init__(self, folder: Path, ids: Sequence[str], devices: Devices) -> None:
        self.file, self.ids, self.devices = devices.own_file(folder / "non_finite.json"), ids, devices
        self.pending: list[tuple[int, list[int], list[str], Tensor, torch.cuda.Event | None]] = []

    def note(self, step: int, indices: Tensor, losses: dict[str, Tensor]) -> None:
        """Add a step's losses, and look at those that are there by now.

        Args:
            step: steps done before it. indices: (B,) of its images. losses: scalars.
        """
        values, copied = torch.stack([*losses.values()]).detach(), None
        if self.devices.device.type == "cuda":
            values, copied = values.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self.pending.append((step, indices.tolist(), list(losses), values, copied))
        self.look(left=0 if copied is None else 1)

    def look(self, left: int = 0) -> None:
        """Look at all noted losses but the last `left`; an InputError for one that is not finite."""
        while len(self.pending) > left:
            step, indices, names, values, copied = self.pending.pop(0)
            if copied is not None:
                copied.synchronize()
            if bool(torch.isfinite(values).all()):
                continue
            losses = {name: repr(value) for name, value in zip(names, values.tolist())}
            write_json(self.file, {"step": step, "losses": losses, "ids": [self.ids[i] for i in indices]})
            raise InputError(
                f"the loss is not finite at step {step} ({losses}); its images are listed in {self.file}; "
                "lower --lr or use --clip-grad"
            )

    def before_checkpoint(self, method: nn.Module, step: int) -> None:
        """Look at everything, the weights too: a finite loss can still have had a gradient that was not.

        Raises:
            InputError: in all processes, where a loss or a weight of one is not finite.
        """
        if self.devices.device.type == "cuda":
            torch.cuda.synchronize(self.devices.device)
        healthy = all(bool(torch.isfinite(values).all()) for _, _, _, values, _ in self.pending)
        healthy = healthy and all(bool(torch.isfinite(p).all()) for p in method.parameters())
        broken = self.devices.any(not healthy)
        self.look()
        if broken:
            raise InputError(
                f"the weights are not finite after step {step}; the last checkpoint is from before; "
                "lower --lr or use --clip-grad"
            )


class Clock:
    """Seconds of a run: since it began, since its last checkpoint, and those spent waiting for data."""

    def __init__(self) -> None:
        self.began = self.saved_at = time.perf_counter()
        self.waited = 0.0

    def next_of(self, batches: Iterator[dict]) -> dict:
        """The next batch; `waited` is how long it took to come."""
        since = time.perf_counter()
        batch = next(batches)
        self.waited = time.perf_counter() - since
        return batch

    def late(self) -> bool:
        """Whether the last checkpoint is long ago: slow machines lose no more."""
        return time.perf_counter() - self.saved_at > LONGEST_UNSAVED

    def saved(self) -> None:
        """A checkpoint was written."""
        self.saved_at = time.perf_counter()

    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.began
