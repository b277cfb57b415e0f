"""The programs in examples/: their arithmetic on numbers made by hand, and whole runs of the quick forms."""

import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fourierbias
import fourierbias.training
from fourierbias import FourierBiasError
from fourierbias.models.checkpoint import Checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def module(monkeypatch):
    """Import an example, as running it would find its neighbours."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return load


# ------------------------------------------------------------------------------------------- arithmetic


def accuracies(curves, shares, seeds=1):
    return [
        {"model": model, "share": share, "seed": seed, "accuracy": value + 0.01 * seed}
        for model, values in curves.items()
        for share, value in zip(shares, values, strict=True)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([-0.1, 0.1, 0.2], [(10**-1.5, "above")]),  # half-way in the logarithm
        ([0.3, 0.1, -0.1], [(10**-0.5, "below")]),
        ([-0.1, 0.3, -0.1], [(10**-1.75, "above"), (10**-0.25, "below")]),
        ([-0.3, -0.2, -0.1], []),
        ([0.0, 0.0, 0.0], []),
        ([-0.1, 0.0, 0.1], [(0.1, "above")]),
    ],
)
def test_crossings_are_interpolated_in_the_logarithm_of_the_share(module, gains, expected):
    curves = {"cnn": [0.5, 0.6, 0.7], "vit": [0.5 + gains[0], 0.6 + gains[1], 0.7 + gains[2]]}
    rows = accuracies(curves, [0.01, 0.1, 1.0], seeds=2)
    found = list(module("data_scale").crossings(rows, "vit"))
    assert [row["from_there_on"] for row in found] == [direction for _, direction in expected]
    assert [row["share"] for row in found] == pytest.approx([share for share, _ in expected])
    assert all(row["certain"] == (0.0 not in gains) for row in found)
    alone = module("data_scale").crossings([row for row in rows if row["seed"] == 0], "vit")
    assert not any(row["certain"] for row in alone)


def responses(example, change, seeds=2):
    """Rows of a network of two layers, at the first of which nothing but ``change`` of the switch happens."""
    rows = []
    for seed in range(seeds):
        for share in example.SHARES:
            about = {"model": f"prs-{100 * share:.0f}%", "switch": share, "seed": seed, "images": 4}
            for depth, value in ((0.0, change(share)), (1.0, -share)):
                layer = {"layer": f"l{depth:.0f}", "depth": depth, "kind": "attention"}
                rows.append({**about, **layer, "response": value + 0.01 * seed, "standard_error": 0.1})
        about = {"model": "vit", "switch": None, "seed": seed, "images": 4}
        for depth, value in ((0.0, -1.0), (0.5, 0.0), (1.0, 1.0)):
            layer = {"layer": f"v{depth}", "depth": depth, "kind": "attention"}
            rows.append({**about, **layer, "response": value, "standard_error": 0.1})
    return rows


def test_rank_correlations_and_their_direction(module):
    example = module("interpolate_bias")
    first, last = example.correlations(responses(example, lambda share: share**3))
    # Upwards to a CNN above the ViT, and downwards to one below it: both lead towards the CNN.
    assert first["rank_correlation"] > 0.9
    assert last["rank_correlation"] < -0.9
    assert all(row["towards_cnn"] and row["every_step"] for row in (first, last))
    assert (last["vit"], last["runs"]) == (1.0, 10)
    assert (last["after_0%"], last["after_100%"]) == pytest.approx((0.005, -0.995))  # means over two seeds
    # In order in both seeds, of 5! orders in each: and no less where the seeds lie far apart.
    assert first["p_value"] == pytest.approx(2 / 120**2)
    apart = responses(example, lambda share: share**3)
    for row in apart:
        row["response"] += 10 * row["seed"]
    first, _ = example.correlations(apart)
    assert (first["rank_correlation"], first["p_value"]) == pytest.approx((1, 2 / 120**2))
    first, _ = example.correlations([row for row in apart if row["seed"] == 0])
    assert first["rank_correlation"] == pytest.approx(1)
    assert np.isnan(first["p_value"])  # one seed cannot tell
    first, _ = example.correlations(responses(example, lambda share: abs(share - 0.5)))
    assert abs(first["rank_correlation"]) < 0.2
    assert not first["every_step"]
    first, _ = example.correlations(responses(example, lambda share: 1 - share))
    assert first["rank_correlation"] < -0.9
    assert not first["towards_cnn"]


def test_distances_between_curves(module):
    example = module("interpolate_bias")
    rows = responses(example, lambda share: 2 * share)
    far = list(example.distances(rows))
    assert [(row["switch"], row["seed"]) for row in far[:3]] == [(0.0, 0), (0.0, 1), (0.25, 0)]
    # To the CNN: |2 share - 2| in one layer, |1 - share| in the other; the other seed's is higher by 0.01.
    assert [row["own_cnn"] for row in far[::2]] == pytest.approx([1.5, 1.125, 0.75, 0.375, 0.0])
    assert [row["other_cnns"] for row in far[-2:]] == pytest.approx([0.01, 0.01])
    # The ViT at -1 and 1; seed 0 that switches at the start at 0 and 0.
    assert far[0]["vit"] == pytest.approx(1.0)
    (row, *_) = example.distances([row for row in rows if row["seed"] == 0])
    assert np.isnan(row["other_cnns"])


def test_one_seed_has_the_spread_over_images_and_more_have_that_over_seeds(module):
    spread = module("_runs").mean_and_spread
    mean, std = spread(np.array([[1.0, 3.0], [2.0, 2.0]]))
    assert mean.tolist() == [2.0, 2.0]
    assert std == pytest.approx([2**0.5, 0.0])
    mean, std = spread(np.array([[1.0], [2.0]]), alone=np.array([0.1, 0.2]))
    assert (mean.tolist(), std.tolist()) == ([1.0, 2.0], [0.1, 0.2])
    assert np.isnan(spread(np.array([[1.0]]))[1]).all()


def test_a_claim_agrees_where_all_of_its_evidence_does(module, capsys):
    claim = module("inductive_bias_zoo").claim
    for shares, verdict in (((1, 1), "agrees"), ((1, 0.6), "agrees in part"), ((1, 0.5), "does not agree")):
        claim("text", *(("said", share) for share in shares))
        assert capsys.readouterr().out.splitlines()[-1] == f"    -> {verdict}"


@pytest.mark.parametrize(
    ("values", "others", "expected"),
    [
        # Two values 2 apart on each side: standard error 2^½, two degrees of freedom, t = 5·2^½ and 3 / 2^½.
        ([70.0, 72.0], [60.0, 62.0], (10.0, 2**0.5, 0.01942, "better")),
        ([60.0, 62.0], [70.0, 72.0], (-10.0, 2**0.5, 0.01942, "worse")),
        ([63.0, 65.0], [60.0, 62.0], (3.0, 2**0.5, 0.16794, "not decidable with these seeds")),
        ([62.0, 62.0], [60.0, 60.0], (2.0, 0.0, 0.0, "better")),
        ([60.0, 60.0], [60.0, 60.0], (0.0, 0.0, 1.0, "not decidable with these seeds")),
        ([62.0], [60.0, 60.0], (2.0, np.nan, np.nan, "not decidable with these seeds")),
    ],
)
def test_a_difference_is_held_against_its_standard_error(module, monkeypatch, values, others, expected):
    given = {"prs-late-first": np.array(values), "cnn": np.array(others)}
    *names, gain, error, p, verdict = module("small_data").compared(given, "cnn").values()
    assert names == ["prs-late-first", "cnn"]
    assert (gain, error, p) == pytest.approx(expected[:3], rel=1e-3, nan_ok=True)
    assert verdict == expected[3]


def test_a_table_makes_every_training_once_and_reads_as_it_was_written(module, tmp_path):
    runs, made = module("_runs"), []

    def make(value):
        made.append(value)
        return [{"value": value, "layer": layer, "good": True, "switch": None} for layer in ("a", "b")]

    for _ in range(2):
        table = runs.Table(tmp_path / "t.csv")
        first, second = (table.of(name, lambda v=v: make(v)) for name, v in (("x", 1 / 3), ("y", 2)))
        assert [row["value"] for row in (*first, *second)] == [0.333333, 0.333333, 2, 2]
        assert second[1] == {"run": "y", "value": 2, "layer": "b", "good": True, "switch": None}
    assert made == [1 / 3, 2]
    (tmp_path / "u.csv").write_text("value\n1\n")
    with pytest.raises(FourierBiasError, match=r"u.csv has no column 'run'"):
        runs.Table(tmp_path / "u.csv")


def test_the_name_of_a_training_tells_it_from_all_others(module):
    name, recipe = module("_runs").run_name, fourierbias.training.Recipe(schedule="uniform:50%", fraction=0.1)
    assert name("prs", "some/cifar10", recipe).startswith("prs-uniform-50-0.1-seed0-")
    assert name("prs", "some/cifar10", recipe) == name("prs", "other/cifar10", recipe)
    changed = (
        ("vit", "cifar10", recipe),
        ("prs", "cifar100", recipe),
        ("prs", "cifar10", replace(recipe, lr=1)),
    )
    assert len({name("prs", "cifar10", recipe), *(name(*key) for key in changed)}) == 4


def test_settings_of_a_recipe_are_changed_by_texts(module):
    settings = module("_runs").settings
    changed = settings(
        {"epochs": 4, "lr": 0.1}, ("lr=0.002", "opt=sgd", "flip=False"), epochs=None, fraction=0.5
    )
    assert changed == {"epochs": 4, "lr": 0.002, "opt": "sgd", "flip": False, "fraction": 0.5}
    for text in ("lr", "lr=", "rate=1"):
        with pytest.raises(FourierBiasError, match=text):
            settings({}, (text,))
    for own in ({"own": ("schedule",)}, {"schedule": "conv"}):
        with pytest.raises(FourierBiasError, match="'schedule=attention': this program sets schedule itself"):
            settings({}, ("schedule=attention",), **own)
    assert settings({}, ("fraction=0.5",), fraction=None) == {"fraction": 0.5}


def test_a_card_has_the_command_that_made_the_checkpoint(module):
    cards, recipe = module("cards"), fourierbias.training.Recipe(epochs=7, schedule="uniform:50%")

    def command(name, learner, dtype="float32"):
        values = {**recipe.as_dict(), "learner": {"name": "Classifier", **learner}}
        checkpoint = Checkpoint("vit", {}, [], recipe=values, dtype=dtype)
        return cards.command(name, checkpoint)

    assert command("a.ckpt", {}, "float16") == (
        "fourierbias train vit --data DATA --epochs 7 --schedule uniform:50% --half -o a.ckpt"
    )
    learner = {"name": "Bootstrap", "mode": "shared", "alignment": "2d", "hint_weight": 1.0}
    for name in ("b.ckpt", "b.agent.ckpt"):  # one command writes both
        assert command(name, learner) == (
            "fourierbias train bootstrap --data DATA --mode shared --hint-weight 1.0 --epochs 7 "
            "--schedule uniform:50% -o b.ckpt"
        )


# ------------------------------------------------------------------------------------------ whole programs


def command(name, *words):
    return [sys.executable, EXAMPLES / f"{name}.py", *words]


def started(folder, name, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(name, *words), cwd=folder, env=environment, **pipes)


def finished(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def check_rerun(folder, name, first, *words):
    """The same command again trains and captures nothing, takes a fraction of the time, says the same."""
    kept = {path: path.stat().st_mtime_ns for path in (folder / name / "runs").iterdir()}
    numbers = (folder / name / f"{name}.csv").read_text()
    started_at = time.monotonic()
    out = finished(started(folder, name, "--quick", *words))
    assert time.monotonic() - started_at < 60
    assert out == "".join(line for line in first.splitlines(True) if not line.startswith("Training "))
    assert {path: path.stat().st_mtime_ns for path in (folder / name / "runs").iterdir()} == kept
    assert (folder / name / f"{name}.csv").read_text() == numbers
    assert not list(folder.rglob("*.state")) + list(folder.rglob("*.partial"))


@pytest.mark.slow
def test_interpolate_bias_stopped_and_gone_on_with(tmp_path):
    process = started(tmp_path, "interpolate_bias", "--quick")
    for line in process.stderr:
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[-1] == "Error: stopped; the same command goes on from here"
    out = finished(started(tmp_path, "interpolate_bias", "--quick"))
    folder = tmp_path / "interpolate_bias"
    assert (folder / "interpolate_bias.png").stat().st_size > 20_000
    rows = table(folder / "interpolate_bias.csv")
    layers = {"vit": 6, **{f"prs-{share}%": 10 for share in (0, 25, 50, 75, 100)}}
    assert {name: sum(row["model"] == name for row in rows) for name in layers} == layers
    assert all(float(row["standard_error"]) > 0 and row["images"] == "64" for row in rows)
    kinds = {row["model"]: row["kind"] for row in rows if row["layer"] == "layer4.1"}
    assert kinds == {name: "conv" if name == "prs-100%" else "attention" for name in layers if name != "vit"}
    correlations = table(folder / "interpolate_bias-correlations.csv")
    assert len(correlations) == 10
    for row in correlations:
        assert -1 <= float(row["rank_correlation"]) <= 1
        line = next(line for line in out.splitlines() if line.startswith(row["layer"]))
        assert f"{float(row['rank_correlation']):.2f}" in line
    far = table(folder / "interpolate_bias-distances.csv")
    assert [float(row["own_cnn"]) for row in far if row["switch"] == "1"] == [0.0]
    check_rerun(tmp_path, "interpolate_bias", out)


@pytest.mark.slow
def test_data_scale(tmp_path):
    out = finished(started(tmp_path, "data_scale", "--quick"))
    folder = tmp_path / "data_scale"
    assert (folder / "data_scale.png").stat().st_size > 20_000
    rows = table(folder / "data_scale.csv")
    assert len(rows) == len({(row["model"], row["share"], row["seed"]) for row in rows}) == 6 * 3
    assert {(row["share"], row["train_images"]) for row in rows} == {
        ("0.01", "48"),
        ("0.03", "144"),
        ("0.1", "480"),
    }
    assert all(abs(int(row["images_seen"]) - 960) <= 48 for row in rows)  # half the largest epoch's images
    assert all(0 < float(row["accuracy"]) < 1 for row in rows)
    for row in filter(lambda row: row["share"], table(folder / "data_scale-crossings.csv")):
        assert 0.01 <= float(row["share"]) <= 0.1
        assert f"{row['from_there_on']} it from a share of {float(row['share']):.2g} on" in out
    check_rerun(tmp_path, "data_scale", out)


@pytest.mark.slow
def test_small_data_shares_trainings_and_goes_on_from_its_table(tmp_path):
    out = finished(started(tmp_path, "small_data", "--quick", "--others", "1"))
    folder = tmp_path / "small_data"
    assert (folder / "small_data.png").stat().st_size > 10_000
    rows = table(folder / "small_data.csv")
    assert len(rows) == len({row["model"] for row in rows}) == 9
    for row in rows:
        assert f"{row['model']:<17} {100 * float(row['accuracy']):6.2f}" in out
    assert out.count("not decidable") == 4  # one seed
    assert [row["seeds"] for row in table(folder / "small_data-means.csv")] == ["1"] * 9
    shares = [(row["model"], float(row["content_share"])) for row in table(folder / "small_data-shares.csv")]
    assert len(shares) == 5 * 12  # networks of prs, layers that can switch
    assert all((share == 0) == (model == "cnn") for model, share in shares)
    for row in table(folder / "small_data-differences.csv"):
        assert f"prs-late-first minus {row['minus']}: {float(row['difference']):+.2f} points: not" in out
    check_rerun(tmp_path, "small_data", out, "--others", "1")
    # Another experiment takes the trainings there are; the table alone is enough to go on.
    scaled = started(tmp_path, "data_scale", "--quick", "--share", "0.1", "--runs", "small_data/runs")
    assert "Training " not in finished(scaled)
    shutil.rmtree(folder / "runs")
    again = finished(started(tmp_path, "small_data", "--quick", "--others", "1"))
    assert again == "".join(line for line in out.splitlines(True) if not line.startswith("Training "))


@pytest.mark.slow
def test_choices_are_made_on_held_out_images(tmp_path):
    words = ["--quick", "--model", "prs"]
    words += [word for text in ("schedule=conv", "schedule=attention,gate_lr=30") for word in ("--try", text)]
    out = finished(started(tmp_path, "choices", *words))
    folder = tmp_path / "choices"
    conv, attention = table(folder / "choices.csv")
    assert conv["holdout"] == attention["holdout"] == "16"
    assert (conv["settings"], attention["settings"]) == ("schedule=conv", "schedule=attention,gate_lr=30")
    for row in (conv, attention):
        assert round(16 * float(row["accuracy"]), 6) % 1 == 0  # sixteen images, not the test set's
        assert f"{100 * float(row['accuracy']):6.2f} %  {row['settings']}" in out
    assert float(conv["mean_content_share"]) == 0 < float(attention["mean_content_share"])
    check_rerun(tmp_path, "choices", out, *words[1:])
    # The best of all comes first; another try is added to what there is.
    more = finished(started(tmp_path, "choices", *words, "--try", "schedule=conv,lr=1e-5,min_lr=0"))
    assert more.count("Training ") == 1
    assert len(table(folder / "choices.csv")) == 3


@pytest.mark.slow
def test_inductive_bias_zoo(tmp_path):
    out = finished(started(tmp_path, "inductive_bias_zoo", "--quick"))
    folder = tmp_path / "inductive_bias_zoo"
    assert (folder / "inductive_bias_zoo.png").stat().st_size > 20_000
    rows = table(folder / "inductive_bias_zoo.csv")
    depths = dict.fromkeys(("eit", "lsra", "vit", "vit-bootstrapped"), 6) | {"cnn": 10, "prs": 10}
    heads = {**depths, "cnn": 0, "prs": 6}  # only the last six blocks of prs have switched
    expected = {
        "accuracy": dict.fromkeys(depths, 4),
        "relative_log_amplitude": depths,
        "high_frequency_share": depths,
        "head_diversity": heads,
    }
    counts = {
        quantity: {
            name: sum((r["model"], r["quantity"]) == (name, quantity) for r in rows) for name in depths
        }
        for quantity in expected
    }
    assert counts == expected
    assert out.count("-> ") == 4
    check_rerun(tmp_path, "inductive_bias_zoo", out)
    # Networks that were trained elsewhere give the same numbers.
    (tmp_path / "trained").mkdir()
    for name in depths:
        schedule = "-late-first" if name == "prs" else ""
        (path,) = (folder / "runs").glob(f"{name}{schedule}-0.1-seed0-????????.ckpt")
        for suffix in (".ckpt", ".csv"):
            os.link(path.with_suffix(suffix), tmp_path / "trained" / f"{name}{suffix}")
    finished(
        started(tmp_path, "inductive_bias_zoo", "--quick", "--checkpoints", "trained", "--output", "again")
    )
    assert table(tmp_path / "again" / "inductive_bias_zoo.csv") == rows


@pytest.mark.slow
def test_quickstart(tmp_path):
    out = finished(started(tmp_path, "quickstart"))
    folder = tmp_path / "quickstart"
    for name in ("cnn", "vit"):
        capture = fourierbias.load(folder / f"{name}.h5")
        for layer, spectrum in capture.items():
            assert f"{name} {layer:<12} Δ log amplitude at π: {spectrum.at(1.0):6.2f} ±" in out
    assert (folder / "compare.png").stat().st_size > 20_000
    assert {row["model"] for row in table(folder / "compare.csv")} == {"cnn", "vit"}


def test_filters_tells_what_every_step_changes(tmp_path):
    vit = EXAMPLES.parent / "checkpoints" / "vit.ckpt"
    out = finished(started(tmp_path, "filters", "--images", "8", vit))
    rows = table(tmp_path / "filters" / "filters.csv")
    capture = fourierbias.capture(vit, "photos", layers="sublayers", limit=8)
    names = list(capture)
    variance = capture.measure("feature_variance")
    values = {
        "relative_log_amplitude": {name: capture[name].at(1.0) for name in names},
        "relative_to_first": {name: capture.with_reference("first")[name].at(1.0) for name in names},
        "feature_variance": {name: variance[name].mean[0] for name in names},
    }
    assert len(rows) == 3 * (len(names) - 1)
    for row in rows:
        before = names[names.index(row["layer"]) - 1]
        change = values[row["quantity"]][row["layer"]] - values[row["quantity"]][before]
        assert float(row["change"]) == pytest.approx(change, abs=2e-5)
        assert float(row["standard_error"]) > 0
        assert row["images"] == "8"
    assert out.count("vit               attention") == out.count("vit               mlp") == 3
    assert (tmp_path / "filters" / "filters.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("interpolate_bias", ["--data", "nowhere"], "no data at nowhere"),
        ("data_scale", ["--share", "2"], "fraction must be in (0, 1]"),
        ("choices", ["--quick", "--try", "lr=0.1,speed"], "'speed' is no NAME=VALUE"),
        ("inductive_bias_zoo", ["--checkpoints", ".", "--quick"], ". holds none of prs.ckpt"),
        ("inductive_bias_zoo", ["--change", "speed=1"], "'speed=1' is no NAME=VALUE"),
    ],
)
def test_bad_input_gets_one_line(module, monkeypatch, tmp_path, capsys, name, words, message):
    monkeypatch.chdir(tmp_path)
    program = module(name).main
    with pytest.raises(SystemExit) as stopped:
        program.main([*words], prog_name=name)
    assert stopped.value.code != 0
    assert message in capsys.readouterr().err.splitlines()[-1]
