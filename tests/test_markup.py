"""Names that users choose reach pages, tables, figures and shells as text, and CSV brings them back as they were."""

import csv
import html.parser
import json
import os
import random
import re
import shlex
import subprocess
import sys
import types
import xml.etree.ElementTree as ET

import markdown
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from medssl import compare, evaluate_features, finetune_classification, markup, train_simclr
from medssl.datasets.base import Info
from medssl.datasets.luna import read_nodules
from medssl.engine import options
from medssl.engine.guards import BadFiles
from medssl.errors import InputError
from medssl.files import read_csv, write_csv
from medssl.models.encoders import make_encoder
from medssl.preprocess import check_data, luna
from medssl.reading.tables import read_list, read_patients, write_list
from medssl.study import figures, results
from medssl.study.report import loss_curves
from medssl.study.slurm import slurm_script
from medssl.tasks import plots

# What a file's name may hold on Linux: everything but "/".
NASTY = '=1+1<img src=x onerror=a()>&amp;|`x`"\' $\\frac$ %_{}~^#*[b](c)\n\x1b[31m;,--\u202e<b>#000000 url(#a) id="'
SEEN = NASTY.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
IN_A_LINE = SEEN.replace("\n", r"\n")
REASON = f"@{NASTY}</td></table></pre><script>a()</script>"
SIGNS = "=+-@'\"\\|`$%&#_{}~^*[]()<>!;:,. \t\r\n\x00\x1b\u202e\udce9aéß１＝\u3000"


def names(count):
    """Made of signs that mean something somewhere; the same ones every time."""
    draw = random.Random(0)
    return ["".join(draw.choices(SIGNS, k=draw.randint(1, 9))) for _ in range(count)]


# One language after the other ----------------------------------------------------------------------


def test_what_cannot_be_seen_is_written_out():
    assert (
        markup.one_line("a\n\x1b[31m\u202e\udce9\x00é\u3000\u200d") == "a\\n\\x1b[31m\\u202e\\udce9\\x00é\u3000\u200d"
    )
    assert markup.printable("a\nb\t") == "a\nb\\t"


def test_no_cell_is_a_formula_and_all_come_back(tmp_path):
    known = ["=1", "+a", "-a", "@a", "\t=1", " =1", "\n=1", "＝1", "'=1", "''=1", "'a", "a=1", "-1.5", "-1,5", "-1+1"]
    written = [name for name in (*known, *names(3000)) if "\0" not in name]  # which no name of a file holds
    write_csv(tmp_path / "t.csv", [{"id": name, "=x": k} for k, name in enumerate(written)])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *lines = csv.reader(file)
    assert header == ["id", "'=x"]
    for text, _ in lines:
        assert text.lstrip()[:1] not in tuple("=+-@＝＋－＠") or float(text) is not None
    back = read_csv(tmp_path / "t.csv")
    assert [row["id"] for row in back] == written
    assert back[3] == {"id": "@a", "=x": "3"}
    write_csv(tmp_path / "again.csv", back)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


def test_numbers_stay_as_they_are(tmp_path):
    row = {"a": -1.5, "b": "-1.5", "c": "+2e-3", "d": "-inf", "e": None, "f": True, "g": float("-inf"), "h": "007"}
    write_csv(tmp_path / "t.csv", [row])
    assert (tmp_path / "t.csv").read_bytes() == b"a,b,c,d,e,f,g,h\r\n-1.5,-1.5,+2e-3,-inf,,True,-inf,007\r\n"


def test_a_damaged_table_is_named(tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": 2}])
    for content in (b"", b"a,b\r\n1", b"a,b\r\n1,2,3\r\n"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"t\.csv: not a whole table; remove .* and run the same command again"):
            read_csv(tmp_path / "t.csv")


def test_tables_of_patients_and_nodules_come_back(tmp_path):
    write_csv(tmp_path / "patients.csv", [{"file": "=a.mhd", "patient": "-p"}, {"file": "'=b.mhd", "patient": "+1"}])
    told = read_patients(tmp_path)
    assert (told["=a.mhd"], told["=a"], told["'=b.mhd"]) == ("-p", "-p", "+1")
    (tmp_path / "subset0").mkdir()
    record = {"settings": {}, "cubes": 1, "seconds": 0, "rows": [[3, 1, -1.5, 2.0, 3.0, 1.0]]}
    (tmp_path / "subset0" / "=uid.nodules.json").write_text(json.dumps(record))
    luna.summarise(tmp_path, luna.Nodules("table", None))
    assert (tmp_path / "nodules.csv").read_text().splitlines()[1].startswith("'=uid,3,1,0,-1.5,")
    (row,) = read_nodules(tmp_path / "nodules.csv")
    assert (row["uid"], row["file"]) == ("=uid", "subset0/=uid_nodule_3.npy")


def test_a_list_holds_what_it_can_bring_back(tmp_path):
    held = ["a b.png", "c", "'d'.PNG", "e.nii.gz"]
    write_list(tmp_path / "list.txt", held)
    assert read_list(tmp_path / "list.txt")[0] == held
    for name in ("a\nb.png", "a\rb.png", " a.png", "a.png ", "a b", "a.png b.png", "\udce9.png", ""):
        with pytest.raises(InputError, match="an image list cannot hold this name"):
            write_list(tmp_path / "list.txt", ["a.png", name])
    assert read_list(tmp_path / "list.txt")[0] == held


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def html_of(text):
    return Page(markdown.markdown(text, extensions=["tables"]))


def test_markdown_shows_names_as_they_are():
    for name in (NASTY, "_a_", "__a__", "a_b", "p < 0.001", "**a**", "<http://a.b>", "http://a.b", "www.a.b", "&lt;"):
        page = html_of(f"| a | b |\n| --- | --- |\n| {markup.markdown_text(name)} | end |")
        assert page.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"], name
        assert page.texts[-2].strip() == markup.one_line(name)
        assert page.texts[-1].strip() == "end"
    assert markup.markdown_text("a_b, p < 0.001, R&D, -1.5 ± 2") == "a_b, p < 0.001, R&D, -1.5 ± 2"


LATEX = re.compile(r"\\([a-z]+)\{\}|\{\\char34\}|\$([<>-]|\\pm)\$|\\([&%$#_{}])|\{\}|([^\\{}$&%#_~^`'\"|<>])")


def read_latex(text):
    """The text that LaTeX would set, of what has neither markup nor ligatures."""
    said = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textasciigrave": "`"}
    said |= {"textquotesingle": "'", "textbar": "|"}
    out = ""
    while text:
        found = LATEX.match(text)
        assert found, text
        if found[1]:
            out += said[found[1]]
        elif found[2]:
            out += {"-": "−", "\\pm": "±"}.get(found[2], found[2])
        else:
            out += found[3] or found[4] or ('"' if "char34" in found[0] else "")
        text = text[found.end() :]
        assert not (found[4] and found[4] in "-," and text[:1] == found[4])  # LaTeX would join them
    return out


def test_latex_shows_names_as_they_are():
    for name in (NASTY, *names(300)):
        assert read_latex(markup.latex_text(name)) == markup.one_line(name)


def test_shells_get_names_as_they_are():
    words = [NASTY, "\udce9 \x011", "a\nEND\nb", "~", "$HOME", "", "-n", *(n for n in names(300) if "\0" not in n)]
    script = f"printf '%s\\0' {markup.shell_words(words)}"
    assert "\n" not in script
    out = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert out.decode(errors="surrogateescape").split("\0")[:-1] == words
    assert markup.shell_words(["a b", "é", "c'd"]) == shlex.join(["a b", "é", "c'd"])


def test_a_cluster_runs_no_names(tmp_path):
    output, argv = tmp_path / "50%j\nEND\ntouch ran\n", ["--init", "a\nEND\ntouch ran\n", "--slurm"]
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f"#!/bin/bash\nn=$(ls {tmp_path} | grep -c call_)\nprintf '%s\\0' \"$@\" > {tmp_path}/call_$n\n"
        f"cat > {tmp_path}/script_$n\necho 10$n\n"
    )
    sbatch.chmod(0o755)
    text = slurm_script(types.SimpleNamespace(pretrainings=1, jobs=[0, 1]), argv, str(output))
    place = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", text], check=True, capture_output=True, cwd=tmp_path, env=place)
    assert not (tmp_path / "ran").exists()
    assert (output / "slurm").is_dir()
    pattern = (tmp_path / "call_0").read_bytes().decode().split("\0")[1]
    assert pattern == f"--output={str(output).replace('%', '%%')}/slurm/%A_%a.txt"
    script = (tmp_path / "script_2").read_text()
    assert script.count("\n") == 2
    said = script.splitlines()[1].split("exec ")[1].replace(f"{sys.executable} ", "printf '%s\\0' ", 1)
    words = subprocess.run(["bash", "-c", said], capture_output=True, check=True).stdout.decode().split("\0")
    assert words[1:-1] == ["--init", argv[1], "--tables-only"]


# Figures -------------------------------------------------------------------------------------------


def texts_of(path):
    return [
        " ".join("".join(text.itertext()).split()) for text in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_figures_show_names_as_they_are(tmp_path):
    classes = (f"_{NASTY}", "$x$", "_")
    shown = [" ".join(markup.one_line(name).split()) for name in classes]
    info = Info("folder", task="multi-class", classes=classes)
    draw = np.random.default_rng(0)
    rows = [
        {"trial": 0, **{f"true {c}": k % 3 == i for i, c in enumerate(classes)}}
        | {f"probability {c}": draw.random() for c in classes}
        for k in range(60)
    ]
    row = {"task": "t", "percent": 1, "trials": 1, "values": [0.5], "mean": 0.5, "interval": None}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plots.roc(rows, info, tmp_path / "roc.svg")
        plots.calibration(rows, info, tmp_path / "calibration.svg")
        kinds = np.array(classes, dtype=object)
        panels = {name: np.ones((3, 4)) for name in classes}
        evaluate_features.draw_embedding(panels, kinds, info, 9, 0, tmp_path / "embedding.svg")
        figures.label_efficiency([{**row, "init": c} for c in classes], {"t": "AUROC"}, tmp_path / "study.svg")
    for name in ("calibration", "embedding", "study"):
        assert set(shown) <= set(texts_of(tmp_path / f"{name}.svg")), name
    assert texts_of(tmp_path / "embedding.svg").count(shown[1]) == 2  # title, and legend
    assert {text.rpartition(" ")[0] for text in texts_of(tmp_path / "roc.svg")} >= set(shown)


def test_figures_of_the_page_change_no_names():
    lines = [{"step": k, "epoch": k, "loss": 1, NASTY: 1.0, "lr": 1} for k in range(3)]
    page = Page(str(loss_curves(lines)))
    (label,) = [value for key, value in page.attributes if key == "aria-label"]
    assert label == f"{SEEN} over epochs"
    assert IN_A_LINE in [text.strip() for text in page.texts]
    assert not {"img", "b"} & set(page.tags)


# A study -------------------------------------------------------------------------------------------


def make_images(data, classes):
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in classes:
            (data / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 255, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(data / split / name / f"{k}{NASTY}.png")


CLASSES = (f"@{NASTY}", "-1.5", f"_{NASTY}\udce9")  # the last is not UTF-8
SMALL = ["--texture-size", "32", "--image-size", "32", "--workers", "0", "--b", "4", "--steps", "1"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study in which everything has a nasty name, and whose second init failed for a nasty reason."""
    home = tmp_path_factory.mktemp("study")
    make_images(home / f"data{NASTY}", CLASSES)
    weights = home / f"={NASTY}.pt"
    state = make_encoder("resnet18").state_dict()
    torch.save({"state_dict": state, "arch": "resnet18", "dims": 2, "channels": 3}, weights)
    command = ["--data", str(home / f"data{NASTY}"), "--dataset", "folder", *SMALL, "--no-tensorboard", "--jobs", "0"]
    command += ["--no-features", "--init", str(weights), "random", "--annotation-percent", "100", "--epochs", "1"]
    command += ["--trials", "1", "--output", str(home / f"out{NASTY}")]
    compare.main(command)
    output = home / f"out{NASTY}"
    failed = output / "classification" / "100_percent" / "random" / "run_0" / "job.json"
    failed.write_text(json.dumps({**json.loads(failed.read_text()), "status": "failed", "reason": REASON}))
    # Classes of one value, which two images of each may give, have no table of their own.
    (path,) = [path for path in output.rglob("run_0/results.json") if "random" not in str(path)]
    results = json.loads(path.read_text())
    for k, found in enumerate(results["trials"][0]["per_class"].values()):
        found["auroc"] = k / 10
    path.write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        compare.main([*command, "--tables-only"])
    return output


def test_a_studys_tables_bring_names_back(study):
    (path,) = [path for path in study.rglob("run_0/predictions.csv") if "random" not in str(path)]
    rows = read_csv(path)
    assert {row["id"] for row in rows} == {f"test/{name}/{k}{NASTY}.png" for name in CLASSES for k in (0, 1)}
    assert {f"true {name}" for name in CLASSES} < set(rows[0])
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        raw = list(csv.reader(file))
    assert {len(line) for line in raw} == {8}
    (failed,) = [row for row in read_csv(study / "results.csv") if row["status"] == "failed"]
    assert failed["reason"] == REASON
    assert "\n'" not in (study / "results.csv").read_text()
    assert (study / "results.csv").read_text().count("'@=1+1") == 1


def test_a_studys_page_shows_names_as_they_are(study):
    text = (study / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "img"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.tags.count("table") == text.count("<table") == text.count("</table>")
    assert not set("\x1b\u202e") & set(text)
    cells = [text.strip() for tag, text in zip(page.tags, page.texts) if tag in ("td", "th")]
    for name in CLASSES:  # columns of the table by class
        assert markup.printable(name) in cells
    assert markup.printable(REASON) in cells
    (command,) = [text for text in page.texts if text.startswith("python compare.py")]
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[3] == str(study.parent / f"data{NASTY}")
    assert json.dumps(CLASSES[0])[1:-1] not in text


def test_a_studys_other_tables_show_names_as_they_are(study):
    rows = json.loads((study / "comparison.json").read_text())
    assert NASTY in rows[0]["file"]
    nasty = [{**row, "init": f"{row['init']}{NASTY}"} for row in rows]
    page = html_of(results.markdown(nasty, f"m{NASTY}"))
    cells = [text.strip() for tag, text in zip(page.tags, page.texts) if tag in ("td", "th")]
    assert set(page.tags) == {"table", "thead", "tbody", "tr", "th", "td"}
    assert len(cells) == 3 * len(results.HEADER)
    assert cells[3] == f"m{IN_A_LINE} (mean ± std)"
    assert [cells[k * len(results.HEADER) + 2] for k in (1, 2)] == [markup.one_line(row["init"]) for row in nasty]
    lines = results.latex(nasty, f"m{NASTY}").splitlines()
    table = [line.removesuffix(r" \\") for line in lines if line.endswith(r" \\")]
    assert len(lines) == 9
    assert len(table) == 3
    for line, row in zip(table[1:], nasty):
        cells = re.split(r"(?<!\\)&", line)
        assert len(cells) == len(results.HEADER)
        assert read_latex(cells[2].strip()) == markup.one_line(row["init"])
    assert (study / "comparison.tex").read_text().count(r" \\") == 3


def test_a_folders_report_keeps_to_its_lines(tmp_path, capsys):
    make_images(tmp_path / "d", CLASSES)
    for k in (7, 8):
        (tmp_path / "d" / f"{k}{NASTY}.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        check_data.main([str(tmp_path / "d"), "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  7")][0].startswith(f"  7{IN_A_LINE}.png: ")
    assert not any("\x1b" in line for line in lines)
    assert lines[lines.index("unreadable: 2") + 3].startswith("duplicates")


def test_a_bad_file_has_one_line_and_is_known_again(tmp_path):
    for _ in range(2):
        BadFiles(tmp_path, 1, 9).note([f"{NASTY}\udce9: cut"])
    assert (tmp_path / "bad_files.txt").read_text(encoding="utf-8") == f"{IN_A_LINE}\\udce9: cut\n"


def test_errors_have_one_line(capsys):
    parser = options.Parser("")
    with pytest.raises(SystemExit):
        parser.parse_args(["--a\n\x1b[31m"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --a\\n\\x1b[31m (see --help)\n"


# Without standard streams --------------------------------------------------------------------------

PHANTOMS = ["--dataset", "phantom2d", *SMALL]
SCRIPTS = {
    "training": (train_simclr, PHANTOMS, "encoder.pt"),
    "fine-tuning": (finetune_classification, [*PHANTOMS, "--no-tensorboard", "--epochs", "1"], "results.json"),
    "study": (
        compare,
        [*PHANTOMS, "--no-tensorboard", "--no-features", "--jobs", "0", "--trials", "1", "--annotation-percent", "1"],
        "report.html",
    ),
}


@pytest.mark.parametrize("name", ["training", "fine-tuning", pytest.param("study", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("few_radiographs")
def test_a_service_has_no_streams(name, tmp_path, monkeypatch):
    script, words, made = SCRIPTS[name]
    monkeypatch.setattr(sys, "argv", ["script", *words, "--output", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    script.cli()
    assert (tmp_path / made).exists()


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&- 2>&- <&-", ""])
def test_a_daemon_has_no_streams(streams, tmp_path):
    """Closed ones, and none at all; what fails still has its exit code."""
    code = "import sys; sys.stdout = sys.stderr = None; " * (not streams)
    start = "from medssl import train_simclr; train_simclr.cli()"
    for words, end in (([*PHANTOMS, "--output", str(tmp_path)], 0), (["--dataset", "folder", "--data", "none"], 2)):
        call = shlex.join([sys.executable, "-c", code + start, *words])
        assert subprocess.run(["bash", "-c", f"exec {call} {streams}"], timeout=300).returncode == end
    assert (tmp_path / "encoder.pt").exists()


def test_names_that_are_not_utf8_are_printed(tmp_path):
    code = "from medssl.errors import run_script; run_script(lambda: print('a\\udce9'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (0, b"a\\udce9\n")
