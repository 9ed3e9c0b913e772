"""How sure a gain is: intervals against simulations, and numbers of trials against published tables."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medssl.errors import InputError
from medssl.files import write_csv, write_json
from medssl.study import results
from medssl.study.intervals import Judged, power_of, trials_for, two_way_interval
from medssl.study.jobs import Job
from medssl.tasks.segmentation import summarise_cases


def mean_over(values):
    """A run whose number is the mean over its cases."""
    return Judged([str(i) for i in range(len(values))], lambda counts: float(values @ counts / counts.sum()))


@pytest.mark.parametrize(("trials", "spread"), [(5, (0.0, 0.1)), (5, (0.03, 0.01)), (3, (0.02, 0.05))])
def test_intervals_hold_the_true_gain_as_often_as_they_say(trials, spread):
    """Gains of 0 with noise of the trials (the seeds), of the cases (the test set), and of both."""
    rng, cases, studies = np.random.default_rng(0), 40, 200
    nothing = mean_over(np.zeros(cases))
    hits = 0
    for study in range(studies):
        noise = rng.normal(0, spread[0], (trials, 1)) + rng.normal(0, spread[1], (1, cases))
        noise += rng.normal(0, 0.05, (trials, cases))
        low, high = two_way_interval([mean_over(row) for row in noise], [nothing] * trials, 100, study)
        hits += low <= 0 <= high
    # 95 %, less what 100 resamples and 200 studies leave to chance. Where only the cases matter, Student's interval
    # over the trials alone holds it in 42 % of 2000 studies.
    assert hits / studies >= 0.9


def test_one_trial_or_other_cases_have_no_interval():
    a, b = mean_over(np.arange(4.0)), mean_over(np.arange(5.0))
    assert two_way_interval([a], [a]) is None
    assert two_way_interval([a, a], [a, b]) is None
    assert two_way_interval([a, a], [a, a]) == (0, 0)


def test_classes_are_judged_as_their_table_says(tmp_path):
    rng = np.random.default_rng(0)
    true, scores = rng.integers(0, 2, 30), rng.random(30).round(1)  # with ties
    rows = [
        {"id": f"{i}.png", "patient": i // 2, "true a": 1.0 - t, "true b": float(t), "true c": "nan",
         "probability a": 1 - s, "probability b": s, "probability c": 0.5}
        for i, (t, s) in enumerate(zip(true, scores))
    ]  # fmt: skip
    write_csv(tmp_path / "p.csv", rows)
    judged = Judged.of_classes(tmp_path / "p.csv")
    assert len(set(judged.units)) == 15
    assert judged.metric(np.ones(30, int)) == pytest.approx(roc_auc_score(true, scores))
    counts = rng.integers(0, 3, 30)
    wanted = roc_auc_score(np.repeat(true, counts), np.repeat(scores, counts))
    assert judged.metric(counts) == pytest.approx(wanted)
    assert np.isnan(judged.metric(true))
    (tmp_path / "p.csv").write_text("id,true a,probability a\nx,1,maybe\n")
    with pytest.raises(InputError, match="p.csv: damaged"):
        Judged.of_classes(tmp_path / "p.csv")


def test_cases_are_judged_as_their_table_says(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for case in range(6):
        for image in range(1 + case % 2):  # several images of a case count together
            for region in ("a", "b"):
                shared = int(rng.integers(0, 50))
                counts = {"true": shared + case, "predicted": shared + 3 * case, "shared": shared}
                rows.append({"image": image, "case": f"c{case}", "region": region, "dice": 0.5, **counts})
    rows[0] |= dict.fromkeys(("true", "predicted", "shared"), 0)  # of which nobody says anything
    write_csv(tmp_path / "cases.csv", rows)
    judged = Judged.of_cases(tmp_path / "cases.csv")
    assert len(judged.units) == 12
    found = judged.metric(np.ones(12))
    assert found == pytest.approx(summarise_cases(rows, ("a", "b"), ("dice",))["dice"])
    once = np.array([unit == "c3" for unit in judged.units], int)
    own = [row for row in rows if row["case"] == "c3"]
    assert judged.metric(5 * once) == pytest.approx(summarise_cases(own, ("a", "b"), ("dice",))["dice"])


def test_trials_that_a_gain_takes():
    """Numbers of Cohen's tables (1988): effects of 1 and .5 take 10 and 34 pairs."""
    assert [trials_for(deviation, 0.01) for deviation in (0, 0.01, 0.02, 0.15, 0.5)] == [2, 10, 34, 1768, None]
    assert power_of(34, 2.0) == pytest.approx(0.808, abs=1e-3)


def test_a_row_says_how_sure_its_gain_is(tmp_path):
    """Of two inits whose runs have predictions; a failed run's pair is left out."""
    rng = np.random.default_rng(0)
    cells = []
    for init, shift in (("random", 0.0), ("ours", 0.7)):
        for trial in range(3):
            folder = tmp_path / init / str(trial)
            folder.mkdir(parents=True)
            job = Job(f"{init}{trial}", "finetune_classification", ("--init", init), folder, "results.json")
            cells.append(results.Cell("classification", 1.0, init, trial, "auroc", job))
            if (init, trial) == ("ours", 2):
                continue
            true = np.arange(60) % 2
            scores = rng.normal(size=60) + (1 + shift) * true
            pairs = [{"id": i, "true x": float(t), "probability x": s} for i, (t, s) in enumerate(zip(true, scores))]
            write_csv(folder / "predictions.csv", pairs)
            entry = {"auroc": float(roc_auc_score(true, scores)), "seconds": 1.0, "train_images": 4, "per_class": {}}
            entry |= {"start": {"missing": 0, "matched": 1}}
            content = {"trials": [entry], "device": "CPU", "versions": {"torch": "2"}, "config": {}}
            write_json(folder / "results.json", content)
            write_json(folder / "job.json", {"status": "finished", "seconds": 1.0})
    rows = results.gather(cells)
    low, high = rows[1]["gain_interval"]
    assert low < rows[1]["gain"] < high
    assert rows[1]["pairs"] == 2
    assert rows[1]["trials_needed"] == trials_for(
        np.subtract(rows[1]["values"][:2], rows[0]["values"][:2]).std(ddof=1), 0.01
    )
    assert rows[0]["gain_interval"] is rows[0]["trials_needed"] is None
    header, _, _, line = results.markdown(rows, "test AUROC").splitlines()
    assert "| 95 % interval over trials and cases |" in header
    assert header.endswith("| trials that tell 0.01 |")
    assert f"| {low:+.3f} to {high:+.3f} |" in line
    assert line.count("|") == header.count("|")
