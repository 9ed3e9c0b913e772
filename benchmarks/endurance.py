"""Look for what breaks runs: kills, damaged and hostile files, and environments that fail.

  python benchmarks/endurance.py --minutes 60 --output runs/endurance            (or: make endurance MINUTES=60)

Three quarters of the time go to kills (`endure_kills.py`), the rest to files (`endure_files.py`) and environments
(`endure_faults.py`). Counts of several runs with one `--output` add up in its endurance.json; each run takes the next
seed, unless `--seed` says which. Every failing case is kept, and named at the end.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from medssl.benchmarks import endure_faults, endure_files, endure_kills
from medssl.benchmarks.endure_kills import add
from medssl.benchmarks.machine import describe_machine
from medssl.engine import options
from medssl.files import read_json, write_json

PARTS = {"kills": (endure_kills.run, 0.75), "files": (endure_files.run, 0.15), "faults": (endure_faults.run, 0.1)}


def get_parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="of all parts together")
    parser.add_argument("--seed", type=int, help="of all that is drawn; the next that was not used, unless given")
    parser.add_argument("--output", metavar="DIR", default="runs/endurance", help="where failing cases are kept")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="of the three")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    output, whole = Path(args.output), sum(PARTS[part][1] for part in args.parts)
    for part in args.parts:
        found = read_json(output / "endurance.json")
        seed = len(found.get("runs", [])) if args.seed is None else args.seed
        since, (run, share) = time.monotonic(), PARTS[part]
        more = run(60 * args.minutes * share / whole, seed, output / part)
        more.pop("seed", None)
        minutes = round((time.monotonic() - since) / 60, 1)
        note = {"part": part, "seed": seed, "minutes": minutes, "machine": describe_machine()}
        runs = [*found.get("runs", []), note]
        if part != "kills":  # whose counts add up as they come
            more = add(found.get(part), more)
        write_json(output / "endurance.json", {**found, part: more, "runs": runs})
    found = read_json(output / "endurance.json")
    faults = [fault for part in PARTS for fault in found.get(part, {}).get("faults", [])]
    print(json.dumps({part: found[part] for part in PARTS if part in found}, indent=1))
    raise SystemExit(f"{len(faults)} faults" if faults else 0)


if __name__ == "__main__":
    main()
