"""PRS as a user meets it: `prs` trained by the command line on each preset, stopped, captured, plotted."""

import csv

import pytest
import timm
import torch

import fourierbias
from fourierbias import models  # noqa: F401  (registers prs)
from fourierbias.cli import main
from fourierbias.models.checkpoint import build, read_checkpoint
from fourierbias.models.reparam import reparam_layers
from fourierbias.store import load_series
from fourierbias.training import Recipe, train
from fourierbias.training.probe import SpectrumProbe
from fourierbias.training.schedule import Schedule

LAYERS = list(reparam_layers(timm.create_model("prs")))
RECIPE = {"epochs": 2, "fraction": 0.02, "holdout": 32, "batch_size": 16, "gate_lr": 10.0}
STEPS = 6  # in an epoch
WORDS = [word for key, value in RECIPE.items() for word in ("--" + key.replace("_", "-"), value)]


@pytest.fixture
def typed(tmp_path, monkeypatch, capfd):
    """Type a command in an empty folder; it must succeed. Returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def type_command(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert stopped.value.code == 0, err
        return out

    return type_command


def kinds_after(schedule, epochs_done):
    """The kind of every block that the schedule implies: attention, if any of its layers has switched."""
    switched = Schedule.parse(schedule, LAYERS, RECIPE["epochs"]).switched(epochs_done - 1)
    return {
        block: "attention" if any(layer.startswith(block + ".") for layer in switched) else "conv"
        for block in (
            f"layer{stage}.{i}" for stage, count in enumerate((2, 2, 4, 2), 1) for i in range(count)
        )
    }


def kinds_of(capture):
    return {name: layer.attrs["kind"] for name, layer in capture.layers.items()}


@pytest.mark.parametrize("schedule", ["conv", "attention", "uniform:1", "late-first", "early-first"])
def test_each_preset_is_trained_captured_and_plotted(typed, tmp_path, schedule):
    out = typed("train", "prs", "--schedule", schedule, *WORDS, "--probe", 1, "-o", "prs.ckpt")
    assert "fourierbias plot prs.probe.h5" in out
    with open("prs.csv") as file:
        rows = list(csv.DictReader(file))
    planned = Schedule.parse(schedule, LAYERS, RECIPE["epochs"])
    done = set()
    for epoch, row in enumerate(rows):
        assert set(row["switched"].split()) == planned.switched(epoch) - done
        assert not row["switched"] or float(row["logit_change"]) <= 1e-4
        done = planned.switched(epoch)
    network = build(read_checkpoint("prs.ckpt"))
    assert {name for name, layer in reparam_layers(network).items() if layer.is_attention} == done

    typed("capture", "prs.ckpt", "--images", 2, "-o", "prs.h5")
    capture = fourierbias.load("prs.h5")
    assert kinds_of(capture) == kinds_after(schedule, RECIPE["epochs"])
    typed("plot", "prs.h5", "--csv", "prs-plot.csv")
    with open("prs-plot.csv") as file:
        drawn = {row["layer"]: row["kind"] for row in csv.DictReader(file)}
    assert drawn == kinds_of(capture)

    series = load_series("prs.probe.h5")
    assert [epoch for epoch, _ in series] == [0, 1, 2]
    for epoch, probed in series:  # epoch 0 is before anything has switched
        assert kinds_of(probed) == (kinds_after(schedule, epoch) if epoch else kinds_after("conv", 1))
    typed("plot", "prs.probe.h5", "--csv", "probe.csv")
    with open("probe.csv") as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1", "2"}
    assert (tmp_path / "prs.probe.png").stat().st_size > 10_000

    lines = [line.split() for line in typed("info", "prs.ckpt", "--layers", "blocks").splitlines()]
    listed = {line[0]: line for line in lines if line and line[0] in LAYERS}
    assert list(listed) == LAYERS
    assert {name for name, line in listed.items() if line[1] == "attention"} == done
    assert all("gate" in listed[name] for name in done)


@pytest.mark.parametrize("schedule", ["conv", "late-first"])
def test_the_command_line_resumes_a_stopped_training_to_the_same_bits(typed, schedule):
    words = ("train", "prs", "--schedule", schedule, *WORDS, "--probe", 1)
    typed(*words, "-o", "whole.ckpt")

    class StoppedHereError(Exception):
        pass

    def stop(trainer):  # in the second epoch, when layers have switched
        if trainer.updates_done == STEPS + 3:
            raise StoppedHereError

    probe = SpectrumProbe("prs.probe.h5", 1, RECIPE["epochs"])
    recipe = Recipe(**RECIPE, schedule=schedule, save_every=0)
    with pytest.raises(StoppedHereError):
        train("prs", "photos", "prs.ckpt", recipe, on_step=[stop], on_epoch_end=[probe], progress=False)
    typed(*words, "-o", "prs.ckpt", "--resume")
    whole, resumed = (read_checkpoint(name).state_dict for name in ("whole.ckpt", "prs.ckpt"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for (epoch, a), (again, b) in zip(*map(load_series, ("whole.probe.h5", "prs.probe.h5")), strict=True):
        assert epoch == again
        assert all((a[layer].log_amplitude == b[layer].log_amplitude).all() for layer in a)


def test_heads_are_averages_after_every_step(tmp_path):
    seen = []

    def look(run):
        layers = reparam_layers(run.learner.networks[""]).values()
        seen.append(torch.cat([layer.gate.detach().clone() for layer in layers]))

    recipe = Recipe(**RECIPE, schedule="attention")
    train("prs", "photos", tmp_path / "prs.ckpt", recipe, on_step=[look], progress=False)
    gates = torch.stack(seen)
    assert gates.min() == 0  # some wanted to go below
    assert 0 < gates.max() <= 1
    stopped = gates[:-1] == 0
    assert (gates[1:][stopped] > 0).any()  # and came back


def test_a_recast_network_of_timm_trains_from_the_command_line(typed):
    size = ("--epochs", 1, "--fraction", 0.02, "--holdout", 32, "--batch-size", 16, "--image-size", 32)
    typed("train", "resnet10t", "--recast", "layer4.*", *size, "-o", "net.ckpt")
    checkpoint = read_checkpoint("net.ckpt")
    network = build(checkpoint)
    assert checkpoint.arch == "resnet10t"
    layers = reparam_layers(network)
    assert layers
    assert all(name.startswith("layer4.") and layer.is_attention for name, layer in layers.items())
    assert all(layer.gate.abs().max() > 0 for layer in layers.values())
    typed("capture", "net.ckpt", "--images", 2, "-o", "net.h5")
    kinds = kinds_of(fourierbias.load("net.h5"))
    assert kinds == {"layer1.0": "conv", "layer2.0": "conv", "layer3.0": "conv", "layer4.0": "attention"}
