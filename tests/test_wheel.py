"""What is installed: what runs, and nothing else; and it runs from anywhere."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_wheel_runs_by_itself(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words, **more):
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=env | more, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    # From a copy: a build leaves files beside what it builds. Dependencies are those of this environment.
    source = tmp_path / "source"
    run("git", "clone", "-q", ROOT, source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"medssl"}
    tracked = run("git", "-C", source, "ls-files", "*.py", "*.html", "study/*.csv").split()
    outside = ("tests/", "benchmarks/", "docs/", "setup.py")
    assert sorted(names) == sorted(f"medssl/{name}" for name in tracked if not name.startswith(outside))

    venv.create(tmp_path / "env", with_pip=True, system_site_packages=False)
    bin_ = tmp_path / "env" / "bin"
    run(bin_ / "python", "-m", "pip", "install", "-q", "--no-deps", wheel)
    site = next(path for path in sys.path if path.endswith("site-packages"))
    # Other packages come from here, behind the installed wheel; this checkout's own link is not among them.
    others = tmp_path / "others"
    others.mkdir()
    for path in Path(site).iterdir():
        if "medssl" not in path.name:
            (others / path.name).symlink_to(path)
    small = ["--image-size", "32", "--texture-size", "32", "--b", "8", "--workers", "0", "--steps", "2"]
    study = ["--init", "random", "pcrlv2", "--annotation-percent", "1", "--trials", "1", "--no-tensorboard"]
    study += ["--no-features", "--with", "pcrlv2 --local-size 32 --b 8 --steps 2", "--output", "study"]
    run(bin_ / "medssl-compare", *small, *study, PYTHONPATH=str(others), OMP_NUM_THREADS="1")
    assert (tmp_path / "study" / "report.html").stat().st_size > 10_000
    where = run(bin_ / "python", "-c", "import medssl; print(medssl.__file__)", PYTHONPATH=str(others))
    assert where.startswith(str(tmp_path / "env"))
