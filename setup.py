"""The checkout is the package: `pip install -e .` makes every folder importable as `medssl.*`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
NOT_INSTALLED = ("tests", "benchmarks", "docs")  # folders
NOT_MODULES = ("setup",)  # of those beside this file


def packages() -> list[str]:
    """Every folder with an `__init__.py`, below one that has it too."""
    found = ["medssl"]
    waiting = [HERE]
    while waiting:
        for path in sorted(waiting.pop().glob("*/__init__.py")):
            folder = path.parent
            if folder.relative_to(HERE).parts[0] not in NOT_INSTALLED:
                found.append(".".join(("medssl", *folder.relative_to(HERE).parts)))
                waiting.append(folder)
    return found


def commands() -> list[str]:
    """A console command for every script that has a `cli`."""
    found = []
    for folder, package in ((HERE, "medssl"), (HERE / "preprocess", "medssl.preprocess")):
        for path in sorted(folder.glob("*.py")):
            if "\ndef cli(" in path.read_text(encoding="utf-8"):
                found.append(f"medssl-{path.stem.replace('_', '-')} = {package}.{path.stem}:cli")
    return found


class BuildModules(build_py):
    """Leaves out this file, which lies among the modules."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if package != "medssl" or entry[1] not in NOT_MODULES]


setup(
    name="medssl",
    version="0.1.0",
    description="Self-supervised pre-training for medical images, from raw files to an evaluated model",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"medssl": "."},
    packages=packages(),
    package_data={"medssl.study": ["report.html", "published.csv"]},
    cmdclass={"build_py": BuildModules},
    install_requires=(HERE / "requirements.txt").read_text().split(),
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "mkdocs>=1.6"],
        "export": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.31"],
    },
    entry_points={"console_scripts": commands()},
)
