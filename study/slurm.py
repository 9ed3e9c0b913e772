"""A study as arrays of jobs of SLURM."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from medssl.markup import shell_words
from medssl.study.plan import Study

COMPARE = Path(__file__).resolve().parent.parent / "compare.py"
ARRAY = 1000  # runs in an array: by default, SLURM numbers the tasks of one from 0 to 1000


def slurm_script(study: Study, argv: Sequence[str], output: str) -> str:
    """A shell script that submits all runs: pre-trainings, then all others, then the tables."""
    words = [word for word in argv if word != "--slurm"]
    command = shell_words([sys.executable, str(COMPARE), *words])
    logs = str(Path(output).absolute() / "slurm")
    pattern = logs.replace("%", "%%") + "/%A_%a.txt"
    first, count = study.pretrainings, len(study.jobs)

    def submit(options: str, after: Sequence[str], job: str) -> str:
        waits = f" --dependency=afterany:{':'.join(f'${name}' for name in after)}" if after else ""
        return (
            f"$(sbatch --parsable --output=\"$pattern\" {options}{waits} <<'END'\n#!/bin/bash\n"
            f"cd {shell_words([os.getcwd()])} && exec {command} {job}\nEND\n)"
        )

    lines = [
        "#!/bin/bash",
        f"# {first} pre-trainings, {count - first} other runs, and their tables. Submit with: bash FILE",
        "set -e",
        f"logs={shell_words([logs])}",
        f"pattern={shell_words([pattern])}  # %% is a %",
        'mkdir -p "$logs"',
        "# what your cluster wants for each run:",
        'each="--gpus=1 --cpus-per-task=8 --mem=32G --time=1-00:00:00 --requeue"',
    ]
    names: list[str] = []
    before: list[str] = []
    for start, end in ((0, first), (first, count)):
        made = []
        for k in range(start, end, ARRAY):
            made.append(f"runs_{len(names) + len(made)}")
            size, job = min(end - k, ARRAY), f"--job $(({k} + $SLURM_ARRAY_TASK_ID))"
            lines.append(f"{made[-1]}={submit(f'$each --array=0-{size - 1}', before, job)}")
        names, before = names + made, made
    lines.append(f"tables={submit('--cpus-per-task=2 --mem=8G --time=1:00:00', before, '--tables-only')}")
    lines.append(f'echo "submitted: {" ".join(f"${name}" for name in (*names, "tables"))}"')
    return "\n".join(lines)
