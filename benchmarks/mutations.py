"""Faults that the tests must catch: each changes one place of the code, and the tests of that place must fail.

  python benchmarks/mutations.py --output runs/mutations.json                (a copy of the checkout is changed)
  python benchmarks/mutations.py --only views --jobs 2 --output runs/mutations.json

A fault that no test notices, or whose place is not found once, is shown, and the exit code is 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "views", "datasets", "reading", "losses", "tasks", "study", "models")  # and the scripts


@dataclass(frozen=True)
class Fault:
    """What is changed, and where it must be noticed.

    Attributes:
        old, new: texts; `old` is in one file of the code, once.
        tests: names of test files without `test_`, of which those that are there run.
    """

    kind: str
    old: str
    new: str
    tests: tuple[str, ...]


ENGINE = ("engine", "loop", "contrast")
FAULTS = [
    Fault("loop", "default_rng([self.seed, epoch])", "default_rng([self.seed, 0])", ENGINE),
    Fault("loop", "SeedSequence([seed, step, self.rank, 1])", "SeedSequence([seed, 0, self.rank, 1])", ENGINE),
    Fault("loop", "return args.lr * epoch / args.warmup_epochs", "return args.lr", ENGINE),
    Fault("loop", "method.after_step(state.step / total)", "method.after_step((state.step - 1) / total)",
          (*ENGINE, "pcrlv2")),
    Fault("loop", 'json.loads(line)["step"] <= steps_done', 'json.loads(line)["step"] < steps_done', ENGINE),
    Fault("loop", "self.since_best >= patience", "self.since_best > patience", (*ENGINE, "magical")),
    Fault("loop", "self.failed > self.limit * self.reads", "self.failed > self.reads", ENGINE),
    Fault("views", "torch.stack([c, -s], 1), torch.stack([s, c], 1)", "torch.stack([c, s], 1), torch.stack([-s, c], 1)",
          ("views", "views2d")),
    Fault("views", "torch.log2(step.prod(1).sqrt()).round()", "torch.log2(step.prod(1).sqrt()).floor()",
          ("views", "views2d")),
    Fault("views", "[:, : round(ratio * grid * grid)]", "[:, : round(ratio * grid)]", ("magical", "views")),
    Fault("views", "(op == 1) * gray.mean((2, 3), keepdim=True)", "(op == 1) * gray.mean()", ("views", "views2d")),
    Fault("views", "draws.take(axes) < 0.5, draws.take(1, 0, 4)", "draws.take(axes) < 0.5, draws.take(1, 0, 3)",
          ("pcrl", "views")),
    Fault("views", "active = draws.take(5) < 0.95", "active = draws.take(5) < 0.5", ("views3d", "pcrl")),
    Fault("losses", "known.sum().clamp(min=1)", "known.numel()", ("finetune", "classification", "evaluate_features")),
    Fault("losses", "F.cosine_similarity(q_a, p_b.detach(), dim=1)", "F.cosine_similarity(q_a, p_b, dim=1)",
          ("pcrlv2", "methods", "losses")),
    Fault("losses", "(s.shape[1] - 1) / self.images", "s.shape[1] / self.images", ("contrast", "losses")),
    Fault("losses", "same.scatter(1, partners[:, None], False)", "same", ("contrast", "magical", "losses", "methods")),
    Fault("losses", "(2 * both + smooth) / (p.sum(space) + truth.sum(space) + smooth)",
          "(2 * both) / (p.sum(space) + truth.sum(space) + smooth)", ("segmentation_losses", "segmentation", "losses")),
    Fault("losses", "soft_dice(logits.softmax(1)[:, 1:], truth[:, 1:])", "soft_dice(logits.softmax(1), truth)",
          ("segmentation_losses", "segmentation", "losses")),
    Fault("reading", "levels = 255 - levels\n", "levels = levels\n", ("reading",)),
    Fault("reading", "if low != high:\n        image = Image.alpha", "if low == high:\n        image = Image.alpha",
          ("reading",)),
    Fault("reading", "EVEN * np.median(gaps)", "10 * np.median(gaps)", ("volumes",)),
    Fault("reading", "int(n * a / b + 0.5)", "int(n * a / b)", ("volumes", "luna")),
    Fault("reading", "(values <= 255) & (values == np.floor(values))", "(values == np.floor(values))",
          ("volumes", "segmentation", "reading")),
    Fault("reading", "if array.min() < CT_BELOW:", "if array.max() < CT_BELOW:", ("volumes",)),
    Fault("study", "* (len(order) - k)", "* len(order)", ("compare", "study")),
    Fault("study", "difference.std(ddof=1) / math.sqrt(len(difference))", "difference.std(ddof=1)",
          ("compare", "study")),
    Fault("study", "if name not in ids and patient not in patients]", "if name not in ids]", ("compare", "study")),
    Fault("study", "if process.returncode in INTERRUPTED:", "if process.returncode == 0:", ("compare", "jobs")),
    Fault("study", 'row["trials"] == most > 0 and ', "", ("compare", "report", "study")),
    Fault("study", 'row["p_adjusted"] < SIGNIFICANT', 'row["p_adjusted"] > SIGNIFICANT', ("report",)),
]  # fmt: skip


def place_of(fault: Fault, tree: Path) -> Path | None:
    """The file that has the fault's text once, or None."""
    files = [*tree.glob("*.py"), *(path for room in ROOMS for path in (tree / room).glob("**/*.py"))]
    found = [path for path in files if fault.old in path.read_text(encoding="utf-8")]
    return found[0] if len(found) == 1 and found[0].read_text(encoding="utf-8").count(fault.old) == 1 else None


def outcome(fault: Fault, root: Path) -> str:
    """Run the tests on a copy with the fault: "caught", "survived", or "not found"."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "medssl"
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__"))
        path = place_of(fault, tree)
        if path is None:
            return "not found"
        path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        wanted = [tree / "tests" / f"test_{name}.py" for name in fault.tests]
        tests = [str(path) for path in wanted if path.is_file()]
        env = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            return f"pytest: exit code {done.returncode}: {done.stdout[-300:]}"
        if done.returncode == 0:
            return "survived"
        first = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
        return f"caught by {first.partition(' ')[2].partition(' - ')[0].rpartition('/')[2]}"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where the outcomes go, JSON")
    parser.add_argument("--only", default="", help="kind of the faults: loop, views, losses, reading or study")
    parser.add_argument("--tree", default=str(HERE), help="the checkout whose copy is changed")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried side by side")
    return parser


def main() -> None:
    args = get_parser().parse_args()
    chosen = [fault for fault in FAULTS if args.only in fault.kind]
    found = {}

    def do(fault: Fault) -> None:
        found[fault.old] = outcome(fault, Path(args.tree))
        print(f"{fault.kind}: {fault.old!r}: {found[fault.old]}", flush=True)
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(do, chosen))
    missed = sum(not value.startswith("caught") for value in found.values())
    print(f"{len(found)} faults, {len(found) - missed} caught")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
