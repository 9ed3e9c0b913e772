"""report.html: a transfer study on one page that needs nothing else, on a screen, a phone or paper."""

import base64
import io
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from medssl.engine.monitor import loss_names
from medssl.errors import UnreadableImage, unreadable, unusable
from medssl.files import read_json, read_lines, write_text
from medssl.markup import figure_text, printable
from medssl.reading.pictures import recognised
from medssl.study import figures, published
from medssl.study.jobs import Job
from medssl.study.results import DAMAGED, MEASURES, Cell, best_of, cells_of, digits, header_of, in_words

SIGNIFICANT = 0.05
FEW_TRIALS = 5
PICTURE = 1000  # widest side of a picture, pixels
OVERLAYS = 2  # pictures of predictions of an init


def write_report(
    path: Path, command: str, tasks: dict[str, str], rows: list[dict], cells: Sequence[Cell], jobs: Sequence[Job],
    theirs: bool = False,
) -> None:  # fmt: skip
    """Write the page.

    Args:
        command: that made the study. tasks: the metric of each in words.
        rows: what `results.gather` made of `cells`. jobs: all runs. theirs: show what papers report, too.
    """
    entries = {cell: cell.results() for cell in cells}
    done = [entry for entry in entries.values() if entry]
    first = done[0] if done else {"config": {}, "versions": {}, "device": "no machine: no run ended well"}
    data = first["config"].get("dataset") or "the data"
    inits = list(dict.fromkeys(row["init"] for row in rows))
    records = [(job, job.record()) for job in jobs]
    context = {
        "title": f"Does pre-training help on {data}?",
        "subtitle": f"{', '.join(inits)}; {first['config'].get('arch', '')}, {date.today().isoformat()}",
        "warnings": warnings(rows, entries, jobs),
        "tasks": [task_section(name, metric, rows, entries, theirs) for name, metric in tasks.items()],
        "pretrainings": [pretraining_section(job) for job in jobs if job.proof == "encoder.pt" and job.finished()],
        "embeddings": [features_section(job) for job in jobs if job.proof == "features.json" and job.finished()],
        "runs": [run_line(i, job, record) for i, (job, record) in enumerate(records)],
        "runs_summary": runs_summary(records),
        "any_failed": any(not job.finished() for job in jobs),
        "versions": first["versions"] or dict.fromkeys(("medssl", "torch", "python"), "?"),
        "devices": ", ".join(dict.fromkeys(entry["device"] for entry in done)) or first["device"],
        "command": command, "commands": "\n".join(job.command for job in jobs),
    }  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=visible)
    page = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8")).render(context)
    write_text(path, page)


def visible(value: object) -> object:
    """A value of the page, before it is escaped."""
    return value if isinstance(value, Markup) else printable(str(value))


# Words ---------------------------------------------------------------------------------------------


def findings(rows: Sequence[dict]) -> list[str]:
    """What the numbers of one task say, a sentence for each share of labels and init."""
    out = []
    for row in rows:
        if row["gain"] is None:
            continue
        n = digits(row)
        images = "1 image" if row["images"] == 1 else f"{row['images']} images"
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.{n}f}"
        change = f"{abs(row['gain']):.{n}f}{error}"
        where = f"With {row['percent']:g} % of the labels ({images}), {row['init']}"
        if row["p_adjusted"] is not None and row["p_adjusted"] < SIGNIFICANT:
            p = in_words(row["p_adjusted"])
            p = f"p {p}" if p.startswith("<") else f"p = {p}"
            out.append(f"{where} {'helps' if row['gain'] > 0 else 'harms'}: {row['gain']:+.{n}f}{error}, {p}.")
        else:
            side = "above" if row["gain"] > 0 else "below"
            place = f"is {change} {side} the baseline" if row["gain"] else "is where the baseline is"
            told = "which these trials cannot tell from chance"
            if row["pairs"] > 1 and row["p"] is None:
                told = "by the same in all trials, of which there is no test"
            out.append(f"{where} {place}, {told}.")
    return out


def warnings(rows: Sequence[dict], entries: dict[Cell, dict | None], jobs: Sequence[Job]) -> list[str]:
    """What a reader should know before trusting the numbers."""
    out = []
    failed = [job for job in jobs if not job.finished()]
    if failed:
        out.append(f"{len(failed)} of {len(jobs)} runs failed or are missing; numbers are of the others (see Runs).")
    trials = max((len(row["values"]) for row in rows), default=0)
    if trials < FEW_TRIALS:
        number = "1 trial" if trials == 1 else f"{trials} trials"
        out.append(f"{number} of each: too few to tell small differences from chance; give --trials 5 or more.")
    incomplete = dict.fromkeys(
        (cell.init, entry["start"]["missing"]) for cell, entry in entries.items() if entry and entry["start"]["missing"]
    )
    for init, missing in incomplete:
        out.append(f"{init}: {missing} entries of the encoder are not in its file and started at random.")
    for job in jobs:
        for path in sorted(job.folder.rglob("warnings.txt")):
            for text in dict.fromkeys(path.read_text(encoding="utf-8").splitlines()):
                out.append(f"{job.name}: {text}")
    for init in dict.fromkeys(cell.init for cell in entries if cell.job.weights and not cell.job.needs):
        out.append(f"{init}: which images its pre-training saw is not known here; test images must not be among them.")
    for job in dict.fromkeys(cell.job.needs for cell in entries if cell.job.needs):
        own = read_json(job.folder / "config.json")
        used = [entry["config"] for cell, entry in entries.items() if entry and cell.job.needs is job]
        if own and any(own.get("data") != config.get("data") for config in used):
            out.append(
                f"{job.name}: saw other images than fine-tuning trains on; whether test images are among them was not "
                "checked."
            )
    counts: dict[tuple, set[float]] = {}
    for row in rows:
        if row["images"]:
            counts.setdefault((row["task"], row["images"]), set()).add(row["percent"])
    for (task, images), percents in counts.items():
        if len(percents) > 1:
            shares = " and ".join(f"{percent:g} %" for percent in sorted(percents))
            out.append(f"{task}: {shares} of the labels are the same {images} image{'s' * (images != 1)}.")
    torches = {entry["versions"]["torch"] for entry in entries.values() if entry}
    if len(torches) > 1:
        out.append(f"Runs were made with different versions of torch: {', '.join(sorted(torches))}.")
    known = [entry for entry in entries.values() if entry]
    early = sum(bool(entry.get("stopped_early")) for entry in known)
    if early:
        out.append(
            f"{early} of {len(known)} fine-tunings were stopped, as validation did not rise, after too few steps to "
            "learn from (--patience): give epochs more steps (--epoch-steps)."
        )
    last = [e["best_epoch"] >= e["config"]["epochs"] - 0.5 for e in entries.values() if e and "best_epoch" in e]
    if last and sum(last) > len(last) / 2:
        out.append(
            f"In {sum(last)} of {len(last)} fine-tunings the last epoch was the best: longer ones may gain more."
        )
    return out


def runs_summary(records: Sequence[tuple[Job, dict]]) -> str:
    """How many runs, and how long they took together."""
    ended = sum(job.finished() for job, _ in records)
    hours = sum(record.get("seconds", 0) for _, record in records) / 3600
    return f"{ended} of {len(records)} runs ended well; {hours:.1f} hours of work in all."


def run_line(number: int, job: Job, record: dict) -> dict:
    """A line of the table of runs."""
    reason = "" if job.finished() else record.get("reason") or "has not been run"
    shown = {key: record.get(key, "") for key in ("status", "began", "seconds", "machine")}
    config = read_json(job.folder / "config.json") if job.finished() else {}
    results = read_json(job.folder / job.proof) if job.finished() and job.proof.endswith(".json") else {}
    shown["device"] = results.get("device") or config.get("device", "")  # pre-training notes it among its options
    shown["torch"] = (results.get("versions") or config.get("versions") or {}).get("torch", "")
    return {"number": number, "name": job.name, "reason": reason, **shown}


# Sections ------------------------------------------------------------------------------------------


def task_section(
    name: str, metric: str, rows: list[dict], entries: dict[Cell, dict | None], theirs: bool = False
) -> dict:  # fmt: skip
    """What the page shows of a task."""
    own = [row for row in rows if row["task"] == name]
    done = {cell: entry for cell, entry in entries.items() if cell.task == name and entry}
    header = header_of(own[0], metric)
    return {
        "name": name, "metric": metric, "header": header, "baseline": own[0]["init"], "findings": findings(own),
        "curve": efficiency_curve(own, metric) if done else None,
        "rows": [
            {"texts": cells_of(row, minus="−"), "best": best_of(own, row), "failed": row["mean"] is None,
             "first": i > 0 and row["percent"] != own[i - 1]["percent"]}
            for i, row in enumerate(own)
        ],
        "tables": [table for table in (class_table(own), measures_table(own)) if table["columns"]],
        "protocol": ", ".join(dict.fromkeys(entry.get("protocol") or "ours" for entry in done.values())),
        "published": published_rows(name, done) if theirs else None,
        "training": training_curves(done, own, metric), "pictures": predictions(done),
        "options": json.dumps(next(iter(done.values()))["config"], indent=1) if done else "no run ended well",
    }  # fmt: skip


def published_rows(task: str, done: dict[Cell, dict]) -> list[list[str]]:
    """What papers report of the task's set: [init, encoder, number, measure, protocol, source]."""
    sets = dict.fromkeys(entry.get("dataset", "") for entry in done.values())
    return [
        [row.init, row.arch, f"{row.value:g}", row.measure.replace("_", " "), row.protocol or "–", row.source]
        for name in sets for row in published.of(name, task)
    ]  # fmt: skip


def class_table(rows: list[dict]) -> dict:
    """The table by class, with the columns (from 1) in which a row is the best of its share of labels."""
    classes = list(dict.fromkeys(key for row in rows for key in row["per_class"]))
    values = [[round(v, digits(row)) for v in row["per_class"].values() if v is not None] for row in rows]
    if all(len(set(each)) < 2 for each in values):
        classes = []  # as of a binary task, whose two have the number that is in the table of all
    out = []
    for row in rows:
        rivals = [other for other in rows if other["percent"] == row["percent"]]
        texts, best = [], []
        for column, name in enumerate(classes, 3):
            value = row["per_class"].get(name)
            known = [v for v in (other["per_class"].get(name) for other in rivals) if v is not None]
            texts.append("–" if value is None else f"{value:.{digits(row)}f}")
            if value is not None and value == max(known):
                best.append(column)
        out.append({"texts": texts, "best": best})
    return side_table("By class", rows, classes, out)


def measures_table(rows: list[dict]) -> dict:
    """The table of the other measures; of some, less is better, so that none is marked as the best."""
    keys = [key for key in MEASURES if any(key in row["measures"] for row in rows)]
    out = []
    for row in rows:
        texts = []
        for key in keys:
            found, n = row["measures"].get(key), MEASURES[key][1]
            std = "" if found is None or found["std"] is None else f" ± {found['std']:.{n}f}"
            texts.append("–" if found is None else f"{found['mean']:.{n}f}{std}")
        out.append({"texts": texts, "best": []})
    return side_table("Other measures", rows, [MEASURES[key][0] for key in keys], out)


def side_table(heading: str, rows: list[dict], columns: Sequence[str], texts: list[dict]) -> dict:
    """A table of `columns` behind the share of labels and the init of each row."""
    lines = [
        {**text, "texts": [f"{row['percent']:g} %", row["init"], *text["texts"]],
         "first": i > 0 and row["percent"] != rows[i - 1]["percent"]}
        for i, (row, text) in enumerate(zip(rows, texts))
    ]  # fmt: skip
    return {"heading": heading, "columns": columns, "rows": lines}


def pretraining_section(job: Job) -> dict:
    """What the page shows of a pre-training."""
    config, record = read_json(job.folder / "config.json"), job.record()
    lines = read_lines(job.folder / "metrics.jsonl")
    last = next((line for line in reversed(lines) if "loss" in line), {})
    with unusable(job.folder / "metrics.jsonl", DAMAGED):
        summary = f"{last.get('epoch', 0):.3g} epochs, {last.get('step')} steps of {config.get('b')} images"
        if "images_per_s" in last:
            summary += f", {last['images_per_s']} images/s"
        summary += f", {record.get('seconds', 0) / 60:.0f} minutes on {config.get('device')}"
        curve = loss_curves(lines)
    pictures = sorted((job.folder / "samples").glob("*.png"))
    caption = "What the network saw and made, at its last look."
    return {
        "name": job.folder.name, "summary": summary, "curve": curve,
        "picture": picture(pictures[-1], f"samples of {job.name}", caption) if pictures else None,
    }  # fmt: skip


def features_section(job: Job) -> dict:
    """What the page shows of frozen features."""
    path = job.folder / "features.json"
    with unusable(path, DAMAGED):
        (found,) = read_json(path)["results"]
        values = [found[way][key] for way in ("knn", "probe") for key in ("auroc", "accuracy")]
        texts = ["–" if v is None else f"{v:.3f}" for v in values]
    name = job.folder.name
    shown = picture(job.folder / "embedding.png", f"features of test images from {name}", f"{name}: test images.")
    return {"name": name, "texts": texts, "picture": shown}


def predictions(done: dict[Cell, dict]) -> list[dict]:
    """Overlays of each init's first trial with the most labels that has some."""
    out = []
    for init in dict.fromkeys(cell.init for cell in done):
        for cell in sorted((c for c in done if c.init == init), key=lambda c: (-c.percent, c.trial)):
            found = sorted((cell.job.folder / "overlays").glob("*.png"))[:OVERLAYS]
            for path in found:
                caption = f"{init}, {cell.percent:g} % of the labels: image, truth, prediction."
                shown = picture(path, f"{path.stem} as predicted from {init}", caption)
                out += [shown] if shown else []
            if found:
                break
    return out


# Pictures ------------------------------------------------------------------------------------------


def efficiency_curve(rows: list[dict], metric: str) -> Markup:
    """The label-efficiency curve."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    figures.draw_label_efficiency(axes, rows)
    axes.set_ylabel(metric)
    return svg(figure, f"{metric} over the share of labels")


def training_curves(done: dict[Cell, dict], rows: Sequence[dict], metric: str) -> Markup | None:
    """Validation scores over epochs: a panel a share of labels, a colour an init, a line a trial."""
    inits = list(dict.fromkeys(row["init"] for row in rows))
    curves: dict[float, list[tuple[str, list[float], list[float]]]] = {}
    for cell in done:
        lines = [line for line in read_lines(cell.job.folder / "trial_0" / "metrics.jsonl") if "score" in line]
        if len(lines) > 1:
            points = [[line["epoch"] for line in lines], [line["score"] for line in lines]]
            curves.setdefault(cell.percent, []).append((cell.init, *points))
    if not curves:
        return None
    figure, shown = Figure(figsize=(3.6 * len(curves), 3), layout="constrained"), {}
    for axes, (percent, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for init, x, y in lines:
            (shown[init],) = axes.plot(x, y, color=figures.colour_of(inits.index(init)), alpha=0.7, linewidth=1)
        axes.set(title=f"{percent:g} %", xlabel="epoch")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation score")
    names = [init for init in inits if init in shown]  # which need not be in every panel
    labels = [figure_text(name) for name in names]
    figure.legend([shown[name] for name in names], labels, fontsize=8, loc="outside lower center", ncols=5)
    return svg(figure, f"validation scores of {metric} over epochs")


def loss_curves(lines: list[dict]) -> Markup | None:
    """A pre-training's losses over epochs, a panel each."""
    names = loss_names(lines)
    names += dict.fromkeys(name for line in lines for name in line if name.startswith("val_") and name not in names)
    names = [name for name in names if sum(line.get(name) is not None for line in lines) > 1]
    if not names:
        return None
    figure = Figure(figsize=(3 * len(names), 2.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        known = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
        axes.plot(*zip(*known), linewidth=1)
        axes.set(title=figure_text(name), xlabel="epoch")
        axes.grid(alpha=0.3)
    return svg(figure, f"{', '.join(names)} over epochs")


def svg(figure: Figure, title: str) -> Markup:
    """A figure as part of a page, in the page's colour of ink, with its text as text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    own = re.sub(r"\W", "-", title)  # ids of one page are unlike each other
    text = re.sub("<[^>]*>", lambda tag: on_page(tag[0], own), text)  # names between tags stay as they are
    # Texts without a colour are black, whatever the page's.
    label = escape(printable(title))
    return Markup(text.replace("<svg ", f'<svg fill="currentColor" role="img" aria-label="{label}" ', 1))


def on_page(tag: str, own: str) -> str:
    """A tag of a figure with the page's ink, and `own` before its ids."""
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", tag)
    tag = tag.replace("#000000", "currentColor").replace("#b0b0b0", "currentColor")
    # Legends have a white ground, on which light ink would not be seen.
    return tag.replace("fill: #ffffff; opacity: 0.8", "fill: none").replace("stroke: #cccccc", "stroke: none")


def picture(path: Path, alt: str, caption: str) -> dict[str, str] | None:
    """A picture as part of a page, at most `PICTURE` pixels wide; None where it is not there or damaged."""
    try:
        with unreadable(), recognised(path) as file:
            image = file.convert("RGB")
    except UnreadableImage:
        return None
    image.thumbnail((PICTURE, 4 * PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"data": f"data:image/jpeg;base64,{data}", "alt": alt, "caption": caption}
