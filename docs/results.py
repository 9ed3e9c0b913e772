"""MkDocs hook: pages of measured results, which live beside their numbers in benchmarks/results, join the site."""

from pathlib import Path

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_files(files: Files, config: object) -> Files:
    """Add the pages and their pictures and tables as `results/`."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: object, config: object, files: Files) -> str:
    """Links as they are in the checkout, as they are in the site."""
    if page.file.src_uri.startswith("results/"):
        return markdown.replace("](../../docs/", "](../")
    return markdown.replace("](../../benchmarks/results/", "](../results/").replace(
        "](../benchmarks/results/", "](results/"
    )
