"""The demo runs, and its spread is what its repetitions gave."""

import json

import pytest

from medssl import compare, demo, finetune_classification, train_mae
from medssl.benchmarks import demo_spread
from medssl.datasets.phantoms import tissue
from medssl.errors import InputError


def row(seed, gain, **changes):
    return {
        "seed": seed, "images": 20, "random": 0.6, "pretrained": 0.6 + gain, "gain": gain, "minutes": 3.0,
        "settings": demo.SETTINGS, "threads": 1, "cpu": "C", "torch": "2.6.0", "commit": "abc", "date": "2026-11-27",
    } | changes  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_demo_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tissue, "SPLITS", {"train": 400, "val": 32, "test": 32})
    tissue._generated.cache_clear()
    demo.main(["--quick", "--seed", "3", "--output", str(tmp_path)])
    tissue._generated.cache_clear()
    assert "Test AUROC with 8 labelled images" in capsys.readouterr().out
    assert list((tmp_path / "pretraining" / "mae" / "samples").glob("*.png"))
    assert json.loads((tmp_path / "pretraining" / "mae" / "config.json").read_text())["series"] == 3
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["gain"] == pytest.approx(found["pretrained"] - found["random"])
    assert found["settings"] == demo.QUICK
    assert found["minutes"] > 0


def test_settings_are_options_of_a_study():
    """Those of the whole demo, which no test runs."""
    words = [*demo.DATA.split(), "--init", "random", "mae", *demo.SETTINGS["tuning"].split()]
    args, rest = compare.get_parser().parse_known_args(words)
    assert args.trials == demo.TRIALS
    finetune_classification.get_parser().parse_args(rest)
    train_mae.get_parser().parse_args(demo.SETTINGS["pretraining"].split())


def test_spread_is_told_of_today_s_settings_alone(tmp_path):
    write(tmp_path / "rows", [row(0, 0.2), row(1, -0.05), row(2, 0.9, settings={"tuning": "--epochs 1"})])
    words = demo.spread(demo.repetitions(tmp_path / "rows"))
    assert words.endswith("the gain was -0.050 to +0.200, above 0 in 1 of 2 repetitions")
    assert demo.repetitions(tmp_path / "none") == []


def test_tables(tmp_path, capsys):
    write(tmp_path / "rows", [row(0, 0.2), row(1, 0.1)])
    demo_spread.main(["--tables", "--rows", str(tmp_path / "rows")])
    out = capsys.readouterr().out
    assert "| 1 | 2.6.0 | 0.600 | 0.700 | +0.100 | 3.0 |" in out
    assert "gain: 0.150, deviation 0.071" in out
    assert "above 0 in 2 of 2 repetitions" in out
    with pytest.raises(InputError, match="has no repetition with the demo's settings"):
        demo_spread.main(["--tables", "--rows", str(tmp_path / "none")])


def test_repetitions_continue_where_they_ended(tmp_path, capsys, monkeypatch):
    (tmp_path / "demo.py").write_text(
        "import json, sys; seed, output = int(sys.argv[2]), sys.argv[6]\n"
        "sys.exit(3) if seed == 2 else None\n"
        f"row = {row(0, 0.25)} | {{'seed': seed}}\n"
        "json.dump(row, open(output + '/demo.json', 'w'))\n"
    )
    monkeypatch.setattr(demo_spread, "ROOT", tmp_path)
    words = ["--rows", str(tmp_path / "rows"), "--output", str(tmp_path / "out")]
    demo_spread.main(["--seeds", "0", "2", *words])
    assert {each["seed"] for each in demo.repetitions(tmp_path / "rows")} == {0, 1}
    with pytest.raises(InputError, match="--seed 2: the demo ended with 3; see .*log.txt"):
        demo_spread.main(["--seeds", "0", "3", *words])
    assert len(demo.repetitions(tmp_path / "rows")) == 2  # those that were there are not run again
