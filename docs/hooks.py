"""MkDocs hooks: pages of measured results, which live beside their numbers in benchmarks/results, join the site, and
docstrings come where a page asks for them."""

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Files, config: object) -> Files:
    """Add the pages and their pictures and tables as `results/`."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def docstring(found: re.Match) -> str:
    """The docstring of `module.Class`, as it stands in the script."""
    module, name = found[1].rsplit(".", 1)
    return f"\n```text\n{inspect.getdoc(getattr(importlib.import_module(f'medssl.{module}'), name))}\n```\n"


def on_page_markdown(markdown: str, page: object, config: object, files: Files) -> str:
    """Links as they are in the checkout, as they are in the site; docstrings."""
    markdown = re.sub(r"^<!-- docstring ([\w.]+) -->$", docstring, markdown, flags=re.M)
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("](../../docs/", "](../")
    return markdown.replace(f"]({up}../benchmarks/results/", f"]({up}results/")
