"""MkDocs hooks: pages of measured results, which live beside their numbers in benchmarks/results, join the site; its
menu has every page of a method, a data set and a result; docstrings and the table of data sets come where a page asks
for them."""

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

from medssl.datasets import medmnist, registry

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"


def on_config(config: object) -> object:
    """Fill sections of the menu: `methods/` stands for all pages of that folder which the section has not named."""
    for section in config["nav"]:
        for title, entries in section.items():
            if isinstance(entries, list):
                named = [page for entry in entries for page in (entry.values() if isinstance(entry, dict) else [entry])]
                section[title] = [page for entry in entries for page in pages_of(entry, named)]
    return config


def pages_of(entry: object, named: list[str]) -> list[object]:
    """An entry of the menu; of a folder, its pages but the `named` ones."""
    if not isinstance(entry, str) or not entry.endswith("/"):
        return [entry]
    folder = RESULTS if entry == "results/" else DOCS / entry
    return [page for page in sorted(f"{entry}{path.name}" for path in folder.glob("*.md")) if page not in named]


def on_files(files: Files, config: object) -> Files:
    """Add the pages and their pictures and tables as `results/`."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def docstring(found: re.Match) -> str:
    """The docstring of `module.Class`, as it stands in the script."""
    module, name = found[1].rsplit(".", 1)
    return f"\n```text\n{inspect.getdoc(getattr(importlib.import_module(f'medssl.{module}'), name))}\n```\n"


def data_sets() -> str:
    """The table of data sets, a row each; MedMNIST's of one licence, which are alike, share one."""
    lines = ["| name | what it shows | dimensions | labels for | licence |", "| --- | --- | --- | --- | --- |"]
    for row in registry.ROWS:
        if row.module != "medmnist":
            licence = f"[{row.licence}]({row.source})" if row.source else ""
            dims = ", ".join(map(str, row.dims))
            lines.append(f"| `{row.name}` | {row.shows} | {dims} | {', '.join(row.tasks)} | {licence} |")
    for licence in dict.fromkeys(medmnist.LICENCES.values()):
        flags = ", ".join(f"`{flag}`" for flag in medmnist.FLAGS if medmnist.LICENCES[flag] == licence)
        lines.append(f"| {flags} | MedMNIST | 2, 3 | classification | [{licence}](https://medmnist.com) |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: object, config: object, files: Files) -> str:
    """Links as they are in the checkout, as they are in the site; docstrings."""
    if page.file.src_uri.startswith("methods/"):
        markdown = re.sub(r"^<!-- docstring ([\w.]+) -->$", docstring, markdown, flags=re.M)
    if page.file.src_uri == "data/index.md":
        markdown = markdown.replace("<!-- data sets -->", data_sets())
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("](../../docs/", "](../")
    return markdown.replace(f"]({up}../benchmarks/results/", f"]({up}results/")
