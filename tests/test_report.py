"""The report says what the runs found, needs no other file, and is without fault in a real browser."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from medssl.study.jobs import Job
from medssl.study.report import class_table, findings, warnings, write_report
from medssl.study.results import Cell, best_of, gather

VALUES = {  # AUROC of five trials
    ("random", 1): [0.70, 0.72, 0.69, 0.71, 0.73],
    ("random", 100): [0.90, 0.91, 0.90, 0.92, 0.91],
    ("<b>odd & co</b>", 1): [0.80, 0.83, 0.80, 0.81, 0.84],
    ("<b>odd & co</b>", 100): [0.90, 0.92, 0.89, 0.92, None],  # the last trial failed
    ("worse", 1): [None] * 5,
    ("worse", 100): [0.80, 0.81, 0.80, 0.82, 0.81],
}


def finished(folder, reason=None):
    folder.mkdir(parents=True, exist_ok=True)
    ended = {"status": "failed" if reason else "finished", "reason": reason, "began": "2026-01-01T00:00:00+00:00"}
    (folder / "job.json").write_text(json.dumps({**ended, "seconds": 60, "machine": "host"}))


def results(auroc, percent):
    classes = {name: {"auroc": auroc + i / 1000, "interval": [0, 1]} for i, name in enumerate(("a", "b", "c"))}
    entry = {"auroc": auroc, "train_images": 10 * percent, "per_class": classes, "val_score": auroc, "seconds": 50}
    entry |= {"best_epoch": 2, "start": {"matched": 100, "missing": 3, "unexpected": 0}}
    entry |= {"accuracy": auroc - 0.2, "f1": None}
    config = {"dataset": "chest", "arch": "resnet18", "epochs": 4, "data": "D", "list": None}
    versions = {"medssl": "0.1.0", "torch": "2.11", "python": "3.11"}
    return {"trials": [entry], "config": config, "versions": versions, "device": "one GPU"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Cells, and all jobs: a pre-training, features, and five trials of three inits at two shares of labels."""
    home, cells = tmp_path_factory.mktemp("study"), []
    pretraining = Job("pre-training of magical", "train_magical", (), home / "pretraining" / "magical", "encoder.pt")
    finished(pretraining.folder)
    (pretraining.folder / "encoder.pt").touch()
    (pretraining.folder / "config.json").write_text(json.dumps({"epochs": 3, "b": 8, "device": "one GPU", "data": "E"}))
    lines = [{"step": k, "epoch": k / 2, "loss": 2.0 / (k + 1), "contrast": 1.0, "lr": 0.1} for k in range(4)]
    (pretraining.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (pretraining.folder / "warnings.txt").write_text("step 9: all images have nearly the same features\n")
    for percent in (1, 100):
        for k in range(5):
            for init in ("random", "<b>odd & co</b>", "worse"):
                folder = home / str(percent) / re.sub(r"\W", "", init) / str(k)
                value = VALUES[init, percent][k]
                more = {"needs": pretraining, "weights": pretraining.folder / "encoder.pt"} if "odd" in init else {}
                name = f"classification, {percent} %, {init}, trial {k}"
                argv = ("--init", init)
                job = Job(name, "finetune_classification", argv, folder, "results.json", **more)
                cells.append(Cell("classification", percent, init, k, "auroc", job))
                finished(folder, None if value else "CUDA out of memory <script>alert(1)</script>")
                if value:
                    (folder / "results.json").write_text(json.dumps(results(value, percent)))
                    (folder / "trial_0").mkdir()
                    scores = [{"step": e, "epoch": float(e), "score": value - 0.1 / e} for e in (1, 2, 3)]
                    (folder / "trial_0" / "metrics.jsonl").write_text("\n".join(map(json.dumps, scores)))
    (folder / "overlays").mkdir()
    Image.new("RGB", (2400, 100)).save(folder / "overlays" / "case.png")
    features = Job("features of worse", "evaluate_features", (), home / "features" / "worse", "features.json")
    finished(features.folder)
    scores = {"auroc": 0.75, "accuracy": None}
    (features.folder / "features.json").write_text(json.dumps({"results": [{"knn": scores, "probe": scores}]}))
    Image.new("RGB", (300, 300)).save(features.folder / "embedding.png")
    return cells, [pretraining, features, *(cell.job for cell in cells)]


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    cells, jobs = study
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, "python compare.py --init <x>", {"classification": "test AUROC"}, gather(cells), cells, jobs)
    return path


class Reader(html.parser.HTMLParser):
    """Notes what a page asks for, its ids and links within it, and whether every tag is closed."""

    VOID = ("meta", "link", "img", "br", "path", "use", "rect", "line", "circle")

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.ids, self.links, self.text, self.alts = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[key] for key in ("src", "href", "srcset", "xlink:href") if key in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else(page):
    text, reader = page.read_text(encoding="utf-8"), Reader()
    reader.feed(text)
    assert not reader.open
    assert all(source.startswith(("data:", "#")) for source in reader.sources)
    assert {source[1:] for source in reader.sources if source.startswith("#")} <= set(reader.ids)
    assert "url(http" not in text
    assert all(reader.alts)
    assert len(reader.alts) == 2  # overlay and embedding
    assert "<script" not in text
    assert "<b>odd" not in text


def test_the_page_says_what_was_found(page):
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    text = " ".join(" ".join(reader.text).split())
    for part in (
        "Does pre-training help on chest?",
        "With 1 % of the labels (10 images), <b>odd & co</b> helps: +0.106 ± 0.002, p < 0.001.",
        "worse is 0.100 ± 0.000 below the baseline, by the same in all trials, of which there is no test.",
        "6 of 32 runs failed or are missing",
        "CUDA out of memory <script>alert(1)</script>",
        "3 entries of the encoder are not in its file",
        "pre-training of magical: step 9: all images have nearly the same features",
        "pre-training of magical: saw other images than fine-tuning trains on",
        "26 of 32 runs ended well; 0.5 hours of work in all.",
        "python compare.py --init <x>",
        "0.816 ± 0.018",
        "Other measures labels init accuracy 1 % random 0.510 ± 0.016",
    ):
        assert part in text, part


def test_what_few_trials_can_tell(study):
    rows = gather(study[0])
    one = {**rows[1], "gain": -0.02, "standard_error": None, "p_adjusted": None, "images": 1, "percent": 0.5}
    assert findings([one]) == [
        "With 0.5 % of the labels (1 image), <b>odd & co</b> is 0.020 below the baseline, which these trials cannot "
        "tell from chance."
    ]
    assert rows[4]["pairs"] == 4
    assert rows[2]["mean"] is None


def test_p_values_are_of_all_comparisons_of_a_task(study):
    rows = gather(study[0])
    tested = [row for row in rows if row["p"] is not None]
    smallest, largest = sorted(tested, key=lambda row: row["p"])
    assert len(tested) == 2
    assert smallest["p_adjusted"] == pytest.approx(2 * smallest["p"])
    assert largest["p_adjusted"] == pytest.approx(max(largest["p"], 2 * smallest["p"]))


def test_classes_are_shown_where_they_differ(study):
    rows = gather(study[0])
    assert class_table(rows)["columns"] == ["a", "b", "c"]
    for last, shown in ((0.7 + 1e-5, []), (0.8, ["ill", "well"]), (None, [])):
        assert class_table([{**row, "per_class": {"ill": 0.7, "well": last}} for row in rows])["columns"] == shown


def test_the_best_has_all_its_trials(study):
    rows = [row for row in gather(study[0]) if row["percent"] == 100]
    assert [best_of(rows, row) for row in rows] == [True, False, False]  # the second has .9075 of four, .908 the first
    lucky = [{**row, "mean": 0.99} if row["trials"] == 4 else row for row in rows]
    assert [best_of(lucky, row) for row in lucky] == [True, False, False]
    assert [best_of(rows[1:], row) for row in rows[1:]] == [False, True]


def test_what_a_reader_is_warned_of(study, page):
    cells, jobs = study
    rows, entries = gather(cells), {cell: cell.results() for cell in cells}
    said = warnings(rows, entries, jobs)
    assert not any("too few" in text or "different versions" in text or "are the same" in text for text in said)
    assert any("odd & co</b>: 3 entries of the encoder are not in its file" in text for text in said)
    few = [{**row, "values": [0.5], "images": 7} for row in rows]
    mixed = {c: e and {**e, "best_epoch": 4, "versions": {"torch": f"2.{c.trial}"}} for c, e in entries.items()}
    mixed = {c: e and {**e, "stopped_early": c.trial == 0} for c, e in mixed.items()}
    said = "\n".join(warnings(few, mixed, jobs))
    assert "1 trial of each: too few" in said
    assert "classification: 1 % and 100 % of the labels are the same 7 images." in said
    assert "different versions of torch: 2.0, 2.1, 2.2, 2.3, 2.4." in said
    early = sum(bool(entry) and cell.trial == 0 for cell, entry in entries.items())
    assert 0 < early < 24
    assert f"{early} of 24 fine-tunings were stopped, as validation did not rise" in said
    assert "In 24 of 24 fine-tunings the last epoch was the best" in said
    alone = [Cell(c.task, c.percent, c.init, c.trial, c.metric, replace(c.job, needs=None)) for c in cells]
    said = "\n".join(warnings(rows, {cell: cell.results() for cell in alone}, jobs))
    assert "odd & co</b>: which images its pre-training saw is not known here" in said


def test_pictures_of_a_page(page):
    """Figures take the page's ink, which is light on dark, and their parts have names of their own."""
    reader = Reader()
    text = page.read_text(encoding="utf-8")
    reader.feed(text)
    assert len(reader.ids) == len(set(reader.ids))
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(figures) == 3  # over labels, training, losses of the pre-training
    assert all("currentColor" in figure and "#000000" not in figure for figure in figures)
    for figure in figures:
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', figure)) <= {
            pair for name in re.findall(r'id="([^"]+)"', figure) for pair in ((name, ""), ("", name))
        }
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in re.findall(r"jpeg;base64,([^\"]+)", text)]
    assert sorted(sizes) == [(300, 300), (1000, 42)]


def test_damaged_files_do_not_hinder_the_report(study, tmp_path):
    cells, jobs = study
    metrics = cells[0].job.folder / "trial_0" / "metrics.jsonl"
    embedding = jobs[1].folder / "embedding.png"
    kept = metrics.read_text(), embedding.read_bytes()
    metrics.write_text(kept[0] + '\n{"step": 4, "ep')
    embedding.write_bytes(b"no picture")
    write_report(tmp_path / "report.html", "", {"classification": "test AUROC"}, gather(cells), cells, jobs)
    metrics.write_text(kept[0])
    embedding.write_bytes(kept[1])
    assert (tmp_path / "report.html").stat().st_size > 10_000


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="no browser")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(page, tmp_path, width):
    """No error in the console, all pictures there, and nothing wider than the window."""
    probe = tmp_path / "probe.html"
    check = (
        "<script>addEventListener('load', () => document.title = JSON.stringify({"
        "wide: document.documentElement.scrollWidth - innerWidth,"
        "broken: [...document.images].filter(i => !i.naturalWidth).length, images: document.images.length,"
        "svg: [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 50).length"
        "}))</script>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", check + "</body>"), encoding="utf-8")
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={max(width, 500)},900", "--dump-dom"]
    framed = tmp_path / "frame.html"  # a window cannot be as narrow as a phone; a frame can
    framed.write_text(
        f"<iframe id=f src=probe.html style='width:{width}px;height:900px;border:0'></iframe><script>"
        "f.onload = () => setTimeout(() => document.title = f.contentDocument.title, 200)</script>"
    )
    out = subprocess.run(
        [*command, "--allow-file-access-from-files", "--virtual-time-budget=5000", framed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", out.stdout)[1]))
    assert found["wide"] <= 0
    assert (found["broken"], found["images"], found["svg"]) == (0, 2, 0)
    assert "CONSOLE" not in out.stderr


@pytest.mark.skipif(browser() is None, reason="no browser")
def test_on_paper_what_is_folded_is_printed(page, tmp_path):
    tall = "<details><summary>folded</summary><div style='height: 300cm'></div></details>"
    (tmp_path / "tall.html").write_text(page.read_text(encoding="utf-8").replace("</body>", tall + "</body>"))
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    pages = []
    for path in (page, tmp_path / "tall.html"):
        pdf = tmp_path / "printed.pdf"
        subprocess.run([*command, f"--print-to-pdf={pdf}", path.as_uri()], capture_output=True, check=True, timeout=120)
        pages.append(len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())))
    assert pages[1] >= pages[0] + 10
