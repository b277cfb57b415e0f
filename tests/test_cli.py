"""What a user types: every case through `fourierbias.cli.main`, a few through the installed program."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

import fourierbias
import fourierbias.models
import fourierbias.store
from fourierbias.cli import main
from fourierbias.models.checkpoint import Checkpoint, create, save_checkpoint


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Type a command in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def type_command(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return stopped.value.code, out, err

    return type_command


@pytest.fixture
def refused(run, tmp_path):
    """Type a command that must be refused: its one error line; nothing new may be left in the folder."""

    def type_command(*words):
        before = sorted(tmp_path.rglob("*"))
        status, _, err = run(*words)
        assert status == 2
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1
        assert err.splitlines()[-1] == errors[0]
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return errors[0]

    return type_command


def test_help_and_version_are_instant_and_light():
    code = (
        "import sys, time; t = time.perf_counter(); import fourierbias.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'timm', 'matplotlib', 'h5py', 'numpy', 'scipy') if m in sys.modules]\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "capture" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_installed_program_and_the_module_answer():
    for command in (["fourierbias"], [sys.executable, "-m", "fourierbias"]):
        if command == ["fourierbias"]:
            command = [sys.executable.replace("python", "fourierbias")]
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert fourierbias.__version__ in done.stdout


def test_capture_info_and_plot(run, tmp_path):
    status, out, err = run("info", "vit", "--layers", "sublayers")
    assert status == 0
    assert "blocks.0:attn" in out
    assert "108×8×8" in out
    status, out, err = run(
        "capture", "vit", "--layers", "sublayers", "--images", 4, "--path", "diagonal", "--path", "radial",
        "--measure", "high_frequency_share", "--features", "-o", "vit.h5",
    )  # fmt: skip
    assert status == 0, err
    assert "random weights" in err
    assert "Wrote vit.h5: 12 layers, 4 images." in out
    assert "fourierbias plot vit.h5" in out
    with h5py.File("vit.h5") as file:
        assert file["layers/blocks.0:attn/feature_maps"].shape == (4, 108, 8, 8)
        assert json.loads(file.attrs["preprocessing"])["input_size"] == [3, 32, 32]
        assert file.attrs["weights"] == "random seed=0"
    status, out, err = run("plot", "vit.h5", "--csv", "vit.csv")
    assert status == 0, err
    assert (tmp_path / "vit.png").stat().st_size > 10_000
    assert "blocks.0:attn" in (tmp_path / "vit.csv").read_text()
    status, _, err = run("plot", "vit.h5", "--measure", "high_frequency_share", "-o", "share.svg")
    assert status == 0, err
    assert run("plot", "vit.h5", "--path", "radial", "--axis", "input", "-o", "radial.pdf")[0] == 0
    assert run("plot", "vit.h5", "--compat", "park-kim", "--at", "0.9", "-o", "notebook.png")[0] == 0


def test_compare_takes_checkpoints_and_remembers_them(run, tmp_path):
    assert (
        run("train", "cnn", "--epochs", 1, "--fraction", 0.02, "--batch-size", 16, "-o", "cnn.ckpt")[0] == 0
    )
    status, _, err = run("plot", "--compare", "cnn.ckpt", "--images", 3, "-o", "a.png")
    assert status == 0, err
    assert "on the fly" in err
    status, _, err = run("plot", "--compare", "cnn.ckpt", "--images", 3, "-o", "b.png")
    assert "captured before" in err
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "b.png").exists()


def pictures(folder, seed):
    folder.mkdir(parents=True)
    for index in range(3):
        pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(10 * seed + index))
        Image.fromarray(pixels.byte().numpy()).resize((32, 32)).save(folder / f"{index}.png")


def test_other_images_of_the_same_names_are_captured_anew(run, tmp_path, monkeypatch):
    random_checkpoint("cnn.ckpt")
    checkpoint = (tmp_path / "cnn.ckpt").absolute()
    for seed, name in enumerate("ab"):
        pictures(tmp_path / name / "images", seed)
        monkeypatch.chdir(tmp_path / name)
        status, _, err = run("plot", checkpoint, "--data", "images", "-o", "c.png", "--csv", "c.csv")
        assert status == 0, err
        assert "on the fly" in err
    assert (tmp_path / "a" / "c.csv").read_text() != (tmp_path / "b" / "c.csv").read_text()
    drawn = ("plot", checkpoint, "--data", "images", "-o", "c.png", "--overwrite")
    assert "captured before" in run(*drawn)[2]
    (tmp_path / "b" / "images" / "1.png").write_bytes((tmp_path / "a" / "images" / "1.png").read_bytes())
    assert "on the fly" in run(*drawn)[2]


def test_a_list_on_standard_input_serves_every_checkpoint(run, tmp_path, monkeypatch):
    random_checkpoint("cnn.ckpt")
    random_checkpoint("other.ckpt")
    pictures(tmp_path / "images", 0)
    names = "\n".join(f"images/{k}.png" for k in range(3))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(names.encode())))
    status, _, err = run("plot", "cnn.ckpt", "other.ckpt", "--data", "-", "-o", "a.png")
    assert status == 0, err


def random_checkpoint(name):
    network = create("cnn", num_classes=10)
    preprocessing = resolve_model_data_config(network)
    save_checkpoint(
        name, Checkpoint("cnn", network.state_dict(), list("abcdefghij"), preprocessing=preprocessing)
    )


@pytest.mark.parametrize(
    "options", [("--path", "horizontal"), ("--compat", "park-kim"), ("--at", "0.3"), ("--reference", "first")]
)
def test_the_sentence_says_what_the_figure_shows(run, tmp_path, options):
    words = ("--images", 3, "--path", "diagonal", "--path", "horizontal")
    assert run("capture", "cnn", *words, "-o", "cnn.h5")[0] == 0
    status, out, err = run("plot", "--compare", "cnn.h5", *options, "--csv", "cnn.csv")
    assert status == 0, err
    table = csv.DictReader(Path("cnn.csv").read_text().splitlines())
    rows = [row for row in table if row["panel"] == "response"]
    said = re.search(r"in the last layer: cnn (\S+) ± (\S+)\.", out)
    assert [float(word) for word in said.groups()] == [
        pytest.approx(float(rows[-1][key]), abs=0.006) for key in ("y", "standard_error")
    ]
    first, last = float(rows[0]["y"]), float(rows[-1]["y"])
    course = f"cnn {'rises' if last > first else 'falls'} from {first:.2f} by {abs(last - first):.2f}."
    assert f"From the first layer to the last: {course}" in out


def test_the_sentence_names_the_frequency_read(run):
    assert run("capture", "cnn", "--images", 1, "--image-size", 56, "-o", "cnn.h5")[0] == 0
    out = run("plot", "--compare", "cnn.h5")[1]
    assert re.search(r"at π in the last layer: cnn -?\d\.\d\d \(read at 0\.857π\)\.", out)  # 7×7, one image


def test_outputs_that_are_inputs_or_each_other_are_refused(run, refused):
    assert run("capture", "cnn", "--images", 2, "-o", "cnn.h5")[0] == 0
    assert "cnn.h5 is what is to be plotted" in refused("plot", "cnn.h5", "--csv", "cnn.h5", "--overwrite")
    assert "both figure and table" in refused("plot", "cnn.h5", "-o", "a.png", "--csv", "./a.png")


def test_names_of_outputs(run, tmp_path):
    assert "Wrote resnet10t.c3_in1k.h5" in run("capture", "resnet10t.c3_in1k", "--images", 1)[1]
    assert run("capture", "cnn", "--images", 1, "-o", "spectra")[0] == 0
    assert run("plot", "spectra")[0] == 0
    random_checkpoint("a.b.ckpt")
    assert "Wrote a.b.h5" in run("capture", "a.b.ckpt", "--images", 1)[1]


def parameters(checkpoint):
    return sum(value.numel() for value in checkpoint["state_dict"].values())


def test_train_evaluate_resume(run, refused, tmp_path):
    words = ("train", "vit", "--epochs", 1, "--fraction", 0.02, "--batch-size", 16, "-o", "vit.ckpt")
    status, out, err = run(*words)
    assert status == 0, err
    assert "test accuracy" in out
    assert {path.name for path in tmp_path.iterdir()} >= {"vit.ckpt", "vit.best.ckpt", "vit.csv"}
    checkpoint = torch.load("vit.ckpt", weights_only=True)
    assert checkpoint["recipe"]["epochs"] == 1
    status, out, err = run("evaluate", "vit.ckpt", "--data", "photos")
    assert status == 0, err
    accuracy, recorded = (float(word) for word in out.replace("%", "").split() if word[0].isdigit())
    assert accuracy == pytest.approx(recorded, abs=0.1)
    table = ("evaluate", "vit.ckpt", "--data", "photos", "--csv", "accuracies.csv")
    assert run(*table)[0] == 0
    (row,) = csv.DictReader((tmp_path / "accuracies.csv").read_text().splitlines())
    assert (row["model"], row["epochs"], row["parameters"]) == ("vit", "1", str(parameters(checkpoint)))
    assert 100 * float(row["accuracy"]) == pytest.approx(accuracy, abs=0.005)
    assert "accuracies.csv exists" in refused(*table)
    assert run(*words, "--resume")[0] == 0


def test_bootstrapping_writes_two_networks(run, refused, tmp_path):
    words = ("--epochs", 1, "--fraction", 0.02, "--batch-size", 16)
    status, _, err = run("train", "bootstrap", "--mode", "shared", *words)
    assert status == 0, err
    for name, arch in (("vit-bootstrapped.ckpt", "vit"), ("vit-bootstrapped.agent.ckpt", "agent")):
        assert torch.load(name, weights_only=True)["arch"] == arch
        status, _, err = run("capture", name, "--images", 2, "--layers", "sublayers", "-o", f"{arch}.h5")
        assert status == 0, err
    assert "--mode is for training bootstrap" in refused("train", "cnn", "--mode", "joint")


def test_the_published_form_of_eit_weights(run, tmp_path):
    network = timm.create_model("eit_mini")
    torch.save({"model": network.state_dict(), "epoch": 299}, tmp_path / "best_checkpoint.pth")
    status, _, err = run(
        "capture",
        "best_checkpoint.pth",
        "--arch",
        "eit_mini",
        "--images",
        2,
        "--measure",
        "all",
        "-o",
        "eit.h5",
    )
    assert status == 0, err
    capture = fourierbias.load("eit.h5")
    assert [record.attrs["kind"] for record in capture.layers.values()] == ["split"] * 4 + ["attention"]
    assert capture["blocks.0"].attrs["height"] == 19
    assert capture.measure("head_diversity").keys() == capture.keys()


def test_spectra_through_training(run, tmp_path):
    words = ("--epochs", 2, "--fraction", 0.02, "--batch-size", 16)
    status, out, err = run("train", "prs", "--schedule", "uniform:1", "--probe", 1, *words)
    assert status == 0, err
    series = fourierbias.store.load_series("prs.probe.h5")
    assert [epoch for epoch, _ in series] == [0, 1, 2]
    last = {name: record.attrs["kind"] for name, record in series[-1][1].layers.items()}
    assert (last["layer1.0"], last["layer4.1"]) == ("conv", "attention")
    assert run("plot", "prs.probe.h5")[0] == 0
    assert "captures through training" in run("plot", "prs.probe.h5", "prs.ckpt", "-o", "b.png")[2]
    status, out, _ = run("info", "prs.ckpt", "--layers", "blocks")
    assert "content_share" in out


def test_spectra_are_those_of_one_training(run, refused):
    words = ("--fraction", 0.02, "--batch-size", 16)
    assert run("train", "cnn", "--epochs", 2, "--probe", 1, *words, "-o", "a")[0] == 0
    assert run("train", "cnn", "--epochs", 1, "--probe", 1, *words, "-o", "a", "--overwrite")[0] == 0
    assert [epoch for epoch, _ in fourierbias.store.load_series("a.probe.h5")] == [0, 1]
    Path("a.ckpt").unlink()
    assert "a.probe.h5 exists" in refused("train", "cnn", "--epochs", 1, *words, "-o", "a")
    for name in ("lr0.1", "lr0.2"):
        assert run("train", "cnn", "--epochs", 1, "--probe", 1, *words, "-o", name)[0] == 0
    assert Path("lr0.1.probe.h5").exists()
    assert Path("lr0.2.probe.h5").exists()


def test_spectra_through_training_are_of_the_trainings_image_size(run):
    words = ("--epochs", 1, "--fraction", 0.02, "--batch-size", 16, "--image-size", 48)
    assert run("train", "cnn", "--probe", 1, *words)[0] == 0
    ((_, _), (_, last)) = fourierbias.store.load_series("cnn.probe.h5")
    captured = fourierbias.capture("cnn.ckpt", "photos", limit=64)
    assert last["layer1.0"].attrs["height"] == 48
    np.testing.assert_allclose(last["layer4.1"].relative, captured["layer4.1"].relative, atol=1e-4)


def test_evaluation_on_other_classes_is_refused(run, refused, tmp_path):
    random_checkpoint("cnn.ckpt")  # of classes a to j
    for part in ("train", "test"):
        pictures(tmp_path / "data" / part / "b", 0)
        pictures(tmp_path / "data" / part / "x", 1)
    said = refused("evaluate", "cnn.ckpt", "--data", "data")
    assert "tells a, b, c and 7 more apart, and these images have a class x" in said
    for part in ("train", "test"):
        (tmp_path / "data" / part / "x").rename(tmp_path / "data" / part / "j")
    status, _, err = run("evaluate", "cnn.ckpt", "--data", "data")
    assert status == 0, err


def test_weights_files_need_an_architecture(run, refused, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    assert "--arch" in refused("capture", "w.pth")
    status, _, err = run("capture", "w.pth", "--arch", "test_resnet", "--images", 2, "-o", "w.h5")
    assert status == 0, err
    assert fourierbias.load("w.h5").attrs["weights_sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["capture", "resnet5O"], "resnet50"),
        (["capture", "vit", "--data", "nowhere"], "nowhere"),
        (["capture", "vit", "--images", "0"], "0"),
        (["capture", "vit", "--layers", "blok.*"], "matches no module"),
        (["capture", "vit", "-o", "missing/a.h5"], "missing"),
        (["capture", "vit", "--measure", "entropy"], "entropy"),
        (["capture", "vit", "--batch-size", "0"], "batch"),
        (["capture", "vit", "--path", "zigzag"], "zigzag"),
        (["capture", "vit", "--seed", "-1"], "seed"),
        (["capture", "vit", "--seed", "99999999999999999999999"], "seed"),
        (["capture", "vit", "--device", "meta"], "device meta cannot be used"),
        (["capture", "vit", "--resume", "--overwrite"], "one of them"),
        (["capture"], "MODEL"),
        (["captrue", "vit"], "captrue"),
        (["plot", "none.h5"], "none.h5"),
        (["plot"], "--compare"),
        (["train", "no_such_net"], "no_such_net"),
        (["train", "vit", "--data", "nowhere"], "nowhere"),
        (["train", "vit", "--epochs", "0"], "epochs"),
        (["train", "vit", "--fraction", "1.5"], "fraction"),
        (["train", "vit", "--threads", "0"], "threads"),
        (["train", "vit", "--device", "gpu"], "device gpu cannot be used"),
        (["train", "resnet18.foo"], "foo"),
        (["train", "vgg11", "--image-size", "16", "--fraction", "0.02"], "fails on images of 16×16"),
        (["evaluate", "none.ckpt", "--data", "photos", "--device", "gpu"], "device gpu cannot be used"),
        (["evaluate", "none.ckpt", "--data", "photos"], "none.ckpt"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(refused, words, message):
    assert message in refused(*words)


def test_files_that_are_no_files_of_ours(refused, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    assert "text.ckpt" in refused("capture", "text.ckpt")
    assert "text.h5" in refused("plot", "text.h5")
    assert "empty" in refused("capture", "vit", "--data", "empty")
    assert "bad" in refused("capture", "vit", "--data", "bad")
    (tmp_path / "old.h5").write_text("precious")
    assert "--overwrite" in refused("capture", "vit", "-o", "old.h5")
    assert (tmp_path / "old.h5").read_text() == "precious"
