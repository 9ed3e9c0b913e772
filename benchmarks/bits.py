"""Digests of what scripts write, to show that a change of the code changes no result: exports of every method, results
of every fine-tuning, cubes. Digests hold on one machine with one torch.

  python benchmarks/bits.py --output before.json --halves HALVES                 (before the change)
  python benchmarks/bits.py --output after.json --against before.json --halves HALVES

The first command also leaves runs that were stopped half-way in HALVES; the second continues them, to the digests of
runs that were never stopped. `--tree` runs another checkout's code.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
PLAIN = ["--device", "cpu", "--log-every", "1", "--seed", "3"]
TINY = ["--arch", "resnet18", "--image-size", "32", "--b", "8"]
QUEUE = ["--queue", "64"]
CUBES = ["--arch", "unet3d_quarter", "--b", "2", "--cube-size", "16", "16", "8"]
METHODS = {  # options of a tiny run, and those by which two epochs show all that the method does
    "byol": (TINY, []),
    "c2l": ([*TINY, *QUEUE], []),
    "concl": ([*TINY, *QUEUE, "--image-size", "64", "--concepts", "3", "--warm-up", "0"], ["--warm-up", "1"]),
    "densecl": ([*TINY, *QUEUE, "--image-size", "64"], []),
    "genesis": (TINY, []),
    "insdis": ([*TINY, "--negatives", "8"], []),
    "mae": (TINY, []),
    "magical": (TINY, []),
    "moco": ([*TINY, *QUEUE], []),
    "pcl": ([*TINY, *QUEUE, "--clusters", "3", "5", "--warm-up", "0"], ["--warm-up", "1"]),
    "pcrl": ([*TINY, *QUEUE], []),
    "pcrlv2": ([*TINY, "--local-size", "32", "--local-views", "2"], []),
    "simclr": (TINY, []),
}
PREPARED = ("pcrl", "pcrlv2")  # whose cubes `preprocess/luna.py` makes; others take the latter's
VOLUMES = {
    "genesis": CUBES,
    "mae": CUBES,
    "pcrl": [*CUBES, *QUEUE],
    "pcrlv2": [*CUBES, "--local-cube-size", "8", "8", "8", "--local-views", "2"],
}
TUNING = ["--workers", "0", "--no-tensorboard", "--trials", "2", "--epochs", "2"]
# Times, places and machines, which may differ; options are known by what they do.
LEFT_OUT = {"seconds", "config", "versions", "device", "init", "path", "data_digest", "train_seconds", "folder"}


def make_data(folder: Path) -> None:
    """A MedMNIST file, and a folder of pictures of many sizes with a list."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 28), ("val", 12), ("test", 12)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 200, (count, 28, 28)) + 40 * labels[:, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    (folder / "pictures").mkdir()
    lines = []
    for i in range(28):
        sides = 40 + int(rng.integers(60)), 40 + int(rng.integers(60))
        picture = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).resize(sides, Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{i:02d}.png")
        lines.append(f"{i:02d}.png {i % 2}\n")
    for name, part in (("train", lines[:20]), ("val", lines[20:24]), ("test", lines[24:])):
        (folder / f"{name}.txt").write_text("".join(part))


class Tree:
    """A checkout whose scripts are run, each in processes of its own.

    Args:
        root: the checkout. work: a folder for what this class needs.
    """

    def __init__(self, root: Path, work: Path) -> None:
        self.root = root
        (work / "tree").mkdir()
        (work / "tree" / "medssl").symlink_to(root.resolve())
        self.env = os.environ | {"PYTHONPATH": str(work / "tree"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def has(self, method: str) -> bool:
        """Whether there is such a method; an older checkout lacks some."""
        return (self.root / f"train_{method}.py").exists()

    def run(self, module: str, *words: object, processes: int = 1) -> None:
        """Run a script to its end; raises RuntimeError with what it said where it fails."""
        command = [sys.executable, "-m", f"medssl.{module}", *map(str, words)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        running = []
        for number in range(processes):
            env = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = self.env | (env if processes > 1 else {})
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(command, env=env, **pipes))
        said = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise RuntimeError(f"{' '.join(command)}: {said[0][-2000:]}")


def digest_of(value: object) -> str:
    """16 hexadecimal digits of tensors, plain values, and containers of them."""
    made = hashlib.blake2b(digest_size=8)

    def add(part: object) -> None:
        if isinstance(part, dict):
            for key in part:
                add(key)
                add(part[key])
        elif isinstance(part, list | tuple):
            for entry in part:
                add(entry)
        elif isinstance(part, torch.Tensor):
            made.update(f"{part.dtype}{tuple(part.shape)}".encode())
            made.update(part.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(part).encode())

    add(value)
    return made.hexdigest()


def pretrained(folder: Path) -> str:
    """The digest of a pre-training run: what it exports, and its weights and optimiser's state."""
    saved = torch.load(folder / "last.pt", weights_only=True)
    exported = torch.load(folder / "encoder.pt", weights_only=True)
    return digest_of([exported, saved["method"], saved["optimizer"], saved["step"], saved["best"]])


def tuned(folder: Path) -> str:
    """The digest of a fine-tuning run's results, less times and paths, and of its predictions."""

    def less(value: object) -> object:
        if isinstance(value, dict):
            return {key: less(part) for key, part in sorted(value.items()) if key not in LEFT_OUT}
        return [less(part) for part in value] if isinstance(value, list) else value

    name = "features.json" if (folder / "features.json").exists() else "results.json"
    tables = [path.read_bytes() for path in sorted(folder.rglob("*.csv"))]
    return digest_of([less(json.loads((folder / name).read_text())), tables])


def files(folder: Path) -> str:
    """The digest of a folder's arrays."""
    return digest_of(
        [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in sorted(folder.rglob("*.npy"))]
    )


def cubes_of(method: str) -> str:
    """The folder of the prepared cubes that a method takes."""
    return f"cubes_{method if method in PREPARED else PREPARED[-1]}"


def jobs(tree: Tree, data: Path, work: Path, halves: Path, begin: bool) -> dict[str, object]:
    """Name → a function that runs something and gives its digest."""
    listed = ["--data", data / "pictures", "--list", data / "train.txt", "--texture-size", "64"]
    mnist = ["--data", data / "pneumoniamnist.npz", "--dataset", "pneumoniamnist"]
    made: dict[str, object] = {}

    def pretrain(name: str, method: str, *words: object, processes: int = 1) -> None:
        if not tree.has(method):
            return

        def go() -> str:
            folder = work / name.replace("/", "_")
            tree.run(f"train_{method}", *PLAIN, *words, "--output", folder, processes=processes)
            return pretrained(folder)

        made[name] = go

    def half(name: str, method: str, *words: object) -> None:
        """Stop after four of the steps, or continue such a run."""
        if not tree.has(method):
            return

        def go() -> str:
            stopped, folder = halves / name.replace("/", "_"), work / f"half_{name.replace('/', '_')}"
            if begin:
                tree.run(f"train_{method}", *PLAIN, *words, "--steps", 4, "--output", stopped)
                return ""
            shutil.copytree(stopped, folder)
            tree.run(f"train_{method}", *PLAIN, *words, "--output", folder)
            return pretrained(folder)

        made[f"{name}/continued"] = go

    for method, (tiny, whole) in METHODS.items():
        three = [*tiny, *listed, "--steps", 3]
        pretrain(f"{method}/list", method, *three, "--workers", 0)
        pretrain(f"{method}/list/workers", method, *three, "--workers", 2)
        pretrain(f"{method}/list/processes", method, *three, "--workers", 0, processes=2)
        two = [*tiny, *whole, *mnist, "--epochs", 2, "--workers", 0]
        pretrain(f"{method}/epochs", method, *two)
        half(f"{method}/epochs", method, *two)
    for name in ("phantom2d", "fundus2d", "tissue2d"):
        pretrain(f"moco/{name}", "moco", *METHODS["moco"][0], "--dataset", name, "--texture-size", 64, "--steps", 3)
    for method, tiny in VOLUMES.items():
        cubes = [*tiny, "--data", data / cubes_of(method), "--dataset", "luna"]
        pretrain(f"{method}_3d/luna", method, *cubes, "--steps", 3, "--workers", 0)
        pretrain(f"{method}_3d/luna/workers", method, *cubes, "--steps", 3, "--workers", 2)
        pretrain(f"{method}_3d/luna/processes", method, *cubes, "--steps", 3, "--b", 4, "--workers", 0, processes=2)
        pretrain(f"{method}_3d/luna/epochs", method, *cubes, "--epochs", 2, "--workers", 0)
        half(f"{method}_3d/luna/epochs", method, *cubes, "--epochs", 2, "--workers", 0)
    for method in PREPARED:
        made[f"cubes/{method}"] = lambda method=method: files(data / cubes_of(method))
    pretrain("pcrlv2_3d/phantom3d", "pcrlv2", *VOLUMES["pcrlv2"], "--d", 3, "--steps", 3)

    def tune(name: str, script: str, *words: object) -> None:
        def go() -> str:
            folder = work / name.replace("/", "_")
            tree.run(script, "--device", "cpu", *words, "--output", folder)
            return tuned(folder)

        made[name] = go

    given = ["--val-list", data / "val.txt", "--test-list", data / "test.txt"]
    small, patch = ["--arch", "resnet18", "--image-size", "32"], ["--patch", "16", "16", "16", "--patches", "1"]
    tune("classification/medmnist", "finetune_classification", *small, *mnist, *TUNING, "--b", "8")
    tune("classification/list", "finetune_classification", *small, *listed, *given, *TUNING, "--b", "8")
    tune("classification/phantom3d", "finetune_classification", "--d", "3", "--arch", "unet3d_quarter", *TUNING,
         "--b", "2", "--annotation-percent", "4", "--steps", "2", "--cube-size", "16", "16", "16")  # fmt: skip
    tune("segmentation/phantom2d", "finetune_segmentation", *small, "--dataset", "phantom2d", "--texture-size", "32",
         *TUNING, "--annotation-percent", "1", "--epoch-steps", "2", "--b", "8", "--overlays", "2")  # fmt: skip
    tune("segmentation/phantom3d", "finetune_segmentation", "--arch", "unet3d_quarter", *TUNING, *patch, "--steps", "2",
         "--annotation-percent", "4", "--epoch-steps", "2", "--b", "2", "--overlays", "1")  # fmt: skip
    tune("detection/tissue2d", "finetune_detection", "--arch", "resnet18", "--dataset", "tissue2d", "--b", "2",
         "--iterations", "2", "--milestones", "1", "--warmup-iterations", "0", "--sides", "64", "72",
         "--test-side", "64", "--annotation-percent", "5", "--workers", "0", "--no-tensorboard")  # fmt: skip
    tune("features/medmnist", "evaluate_features", *mnist, "--image-size", "32", "--k", "3", "--workers", "0")
    return made


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the digests go, JSON")
    parser.add_argument("--against", help="digests that must be the same")
    parser.add_argument("--halves", required=True, help="folder of data and of runs that are stopped half-way")
    parser.add_argument("--tree", default=str(HERE), help="the checkout whose code runs")
    parser.add_argument("--only", default="", help="run only what has this in its name")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    halves, failed = Path(args.halves), []
    begin = not args.against
    before = {} if begin else json.loads(Path(args.against).read_text())
    with tempfile.TemporaryDirectory() as folder:
        work, data = Path(folder), halves / "data"
        tree = Tree(Path(args.tree), work)
        if not data.exists():
            data.mkdir(parents=True)
            make_data(data)
        if not (data / "scans").exists():
            tree.run("preprocess.make_phantom_ct", "--save", data / "scans", "--count", 2, "--shape", 160, 160, 140)
        for method in PREPARED:  # made anew by this tree
            shutil.rmtree(data / cubes_of(method), ignore_errors=True)
            words = ["--method", method, "--scale", 6, "--workers", 2]
            tree.run("preprocess.luna", "--data", data / "scans", "--save", data / cubes_of(method), *words)
        found: dict[str, str] = {}

        def do(item: tuple[str, object]) -> None:
            name, job = item
            try:
                found[name] = job()
            except (RuntimeError, OSError, KeyError) as error:
                found[name] = "failed"
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            wanted = before.get(name.removesuffix("/continued"))
            if wanted is not None and found[name] != wanted:
                failed.append(name)
                print(f"{name}: {found[name]}, was {wanted}", flush=True)

        todo = [item for item in jobs(tree, data, work, halves, begin).items() if args.only in item[0]]
        with ThreadPoolExecutor(args.jobs) as pool, contextlib.suppress(KeyboardInterrupt):
            list(pool.map(do, todo))
        Path(args.output).write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    bad = [name for name, value in found.items() if value == "failed"]
    print(f"{len(found)} digests, {len(bad)} runs failed" + (f", {len(failed)} differ" if args.against else ""))
    raise SystemExit(bool(bad or failed))


if __name__ == "__main__":
    main()
