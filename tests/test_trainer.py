"""The trainer: it learns, repeats itself, goes on after interruptions to the same bits, keeps files whole."""

import csv
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fourierbias.errors import FourierBiasError
from fourierbias.models.checkpoint import build, create, read_checkpoint
from fourierbias.models.reparam import recast, reparam_layers
from fourierbias.training.data import Data, evaluation_batches, load_data
from fourierbias.training.learner import Classifier, Learner, LearnerEma, batch_accuracy, evaluate
from fourierbias.training.recipe import Recipe
from fourierbias.training.trainer import TrainingInterruptedError, train

PREPROCESSING = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "interpolation": "bicubic",
}
TINY = {
    "cnn": {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)},
    "prs": {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)},
    "vit": {"embed_dim": 36, "depth": 2, "num_heads": 3},
}
RECIPE = {"epochs": 2, "batch_size": 32, "lr": 3e-3, "drop_path": 0.2, "mixup": 0.2, "cutmix": 0.5}
STEPS = 6  # in an epoch


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ({"avx2": True}, None),
        ({"avx512_bf16": True}, torch.bfloat16),  # Zen 4, Cooper Lake
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, torch.bfloat16),  # Sapphire Rapids
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, None),  # the same without AMX
        ({"bf16": True}, torch.bfloat16),  # ARM
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(monkeypatch, capabilities, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert Recipe().autocast_dtype(cpu) is chosen
    assert Recipe(amp="float32").autocast_dtype(cpu) is None
    assert Recipe(amp="bfloat16").autocast_dtype(cpu) is torch.bfloat16


class StoppedHereError(Exception):
    pass


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """So small tensors gain nothing from threads, and wait long for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    whole = load_data("photos", PREPROCESSING, fraction=0.04)
    assert len(whole.train) == 192
    return Data(
        whole.train, whole.evaluation.take(torch.arange(0, 960, 10)), whole.classes, whole.description
    )


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """One training without interruption, to which interrupted ones are compared."""
    folder = tmp_path_factory.mktemp("whole")
    result = train(
        "cnn", data, folder / "a.ckpt", Recipe(**RECIPE), model_args=TINY["cnn"], device="cpu", progress=False
    )
    return folder, result


def run(data, path, name="cnn", recipe=RECIPE, **options):
    options = {"model_args": TINY[name], "device": "cpu", "progress": False, **options}
    return train(name, data, path, Recipe(**recipe), **options)


def weights(path):
    return read_checkpoint(path).state_dict


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stop_at(update, how=None):
    def hook(trainer):
        if trainer.updates_done == update:
            if how is not None:
                os.kill(os.getpid(), how)
            else:
                raise StoppedHereError

    return [hook]


def rows_of(path, without=("images_per_second", "seconds")):
    with open(path) as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------ outcome


@pytest.mark.parametrize(("name", "lr"), [("cnn", 1e-2), ("vit", 3e-3)])
def test_it_learns(data, tmp_path, name, lr):
    recipe = {"epochs": 12, "batch_size": 32, "lr": lr, "evaluate_every": 12}
    result = run(data, tmp_path / "a.ckpt", name, recipe)
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < losses[0] - 0.3
    assert result.metrics["test_accuracy"] > 2.5 / 16


def test_the_checkpoint_is_the_average_and_says_what_it_is(data, whole_run):
    result = whole_run[1]
    checkpoint = read_checkpoint(result.path)
    assert (checkpoint.arch, checkpoint.epoch, checkpoint.classes) == ("cnn", 2, data.classes)
    assert checkpoint.arch_args == {**TINY["cnn"], "drop_path_rate": 0.2}
    assert checkpoint.preprocessing == PREPROCESSING
    assert checkpoint.recipe["lr"] == 3e-3
    assert checkpoint.recipe["data"]["train_images"] == 192
    assert "average" in checkpoint.weights
    model = build(checkpoint)
    found = evaluate(model, data)
    assert found["accuracy"] == checkpoint.metrics["test_accuracy"] == result.metrics["test_accuracy"]
    assert found["loss"] == pytest.approx(checkpoint.metrics["test_loss"], rel=1e-6)
    assert checkpoint.metrics["parameters"] == sum(p.numel() for p in model.parameters())


def test_only_whole_files_are_left(whole_run):
    assert sorted(os.listdir(whole_run[0])) == ["a.best.ckpt", "a.ckpt", "a.csv"]


def test_the_log(whole_run):
    folder, result = whole_run
    with open(folder / "a.csv") as file:
        rows = list(csv.DictReader(file))
    columns = "epoch train_loss train_accuracy test_loss test_accuracy lr images_per_second seconds"
    assert list(rows[0]) == columns.split()
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row, known in zip(rows, result.history, strict=True):
        for key, value in row.items():
            assert float(value) == pytest.approx(known[key], rel=1e-5)
    best = max(result.history, key=lambda row: row["test_accuracy"])
    assert read_checkpoint(folder / "a.best.ckpt").metrics["test_accuracy"] == best["test_accuracy"]


def test_evaluation_now_and_then_and_at_the_end(data, tmp_path):
    calls = []
    recipe = {**RECIPE, "epochs": 3, "evaluate_every": 2}
    hook = lambda epoch, networks: calls.append((epoch, networks[""].training))  # noqa: E731
    result = run(data, tmp_path / "a.ckpt", recipe=recipe, on_epoch_end=[hook])
    assert [row["test_accuracy"] == "" for row in result.history] == [True, False, False]
    assert calls == [(0, False), (1, False), (2, False), (3, False)]
    assert read_checkpoint(result.path).epoch == 3


def test_seed_repeats_and_other_seeds_differ(data, whole_run, tmp_path):
    torch.manual_seed(123)  # of no influence
    run(data, tmp_path / "again.ckpt")
    run(data, tmp_path / "other.ckpt", recipe={**RECIPE, "seed": 1})
    assert same(weights(tmp_path / "again.ckpt"), weights(whole_run[1].path))
    assert not same(weights(tmp_path / "other.ckpt"), weights(whole_run[1].path))


def test_learning_rate_rises_and_falls_by_the_cosine(data, tmp_path):
    rates = []
    recipe = {"epochs": 5, "batch_size": 32, "lr": 1e-2, "min_lr": 1e-4, "warmup_epochs": 1}
    hook = lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])  # noqa: E731
    run(data, tmp_path / "a.ckpt", recipe=recipe, on_step=[hook])
    expected = [
        1e-4 + (1e-2 - 1e-4) * t / STEPS
        if t < STEPS
        else 1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + math.cos(math.pi * t / (5 * STEPS)))
        for t in range(5 * STEPS)
    ]
    assert rates == pytest.approx(expected)


def test_the_rise_takes_a_fifth_of_a_training_at_most(data, tmp_path):
    rates, recipe = [], {"epochs": 2, "batch_size": 32, "lr": 1e-2, "warmup_epochs": 2}
    hook = lambda trainer: rates.append(trainer.optimizer.param_groups[0]["lr"])  # noqa: E731
    run(data, tmp_path / "a.ckpt", recipe=recipe, on_step=[hook])
    assert np.argmax(rates) == 2 * STEPS // 5


class Watching(Classifier):
    """Notes the images and labels of every step."""

    def __init__(self, model, seen):
        super().__init__(model)
        self._seen = seen

    def loss(self, images, targets, progress):
        self._seen.append((images.clone(), targets.clone()))
        return super().loss(images, targets, progress)


def test_every_epoch_has_an_order_and_an_augmentation_of_its_own(data, tmp_path):
    pixels = data.train.pixels[:1].expand(len(data.train), -1, -1, -1)  # all one image
    alike = replace(data, train=replace(data.train, pixels=pixels.contiguous()))
    seen = {True: [], False: []}
    for flip, steps in seen.items():
        recipe = {"epochs": 2, "batch_size": 32, "flip": flip}
        learner = lambda model, recipe, steps=steps: Watching(model, steps)  # noqa: E731
        run(alike, tmp_path / f"{flip}.ckpt", recipe=recipe, learner=learner)
        images, labels = (
            torch.stack(column).flatten(1, 2 - k) for k, column in enumerate(zip(*steps, strict=True))
        )
        assert not torch.equal(labels[:STEPS], labels[STEPS:])
        assert not torch.equal(images[:STEPS], images[STEPS:])
    assert torch.equal(torch.stack([y for _, y in seen[True]]), torch.stack([y for _, y in seen[False]]))
    assert not torch.equal(seen[True][0][0], seen[False][0][0])


def test_smoothing_mixing_and_average_are_the_recipes(data, tmp_path):
    def look(trainer):
        assert trainer.learner.smoothing == 0.3
        mixup = trainer.mixup
        assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.2, 0.5, 0.0)
        assert same(trainer.ema.module.state_dict(), trainer.learner.state_dict())

    recipe = {**RECIPE, "epochs": 1, "smoothing": 0.3, "ema": 0.0}
    run(data, tmp_path / "a.ckpt", recipe=recipe, on_step=[look])
    x, y = torch.randn(5, 7), torch.arange(5)
    expected = -((0.7 * F.one_hot(y, 7) + 0.3 / 7) * x.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Classifier(nn.Flatten(), 0.3).loss(x, y, 0.0)[0], expected)


def test_weight_decay_spares_vectors_and_what_the_network_exempts(data, tmp_path):
    found = {}

    def hook(trainer):
        names = {id(p): name for name, p in trainer.learner.named_parameters()}
        for group in trainer.optimizer.param_groups:
            found.update({names[id(p)]: group["weight_decay"] for p in group["params"]})
        raise StoppedHereError

    with pytest.raises(StoppedHereError):
        run(data, tmp_path / "a.ckpt", "vit", on_step=[hook])
    assert found["model.blocks.0.mlp.fc1.weight"] == 0.05
    for name in ("pos_embed", "cls_token", "norm.bias", "blocks.0.mlp.fc1.bias"):
        assert found[f"model.{name}"] == 0.0


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("update", [1, 4, STEPS, STEPS + 1, 2 * STEPS - 1])
def test_resume_ends_with_the_same_bits(data, whole_run, tmp_path, update):
    path = tmp_path / "a.ckpt"
    with pytest.raises(StoppedHereError):
        run(data, path, recipe={**RECIPE, "save_every": 0}, on_step=stop_at(update))
    assert not (tmp_path / ".a.state.partial").exists()
    run(data, path, resume=True)
    assert same(weights(path), weights(whole_run[1].path))
    assert rows_of(tmp_path / "a.csv") == rows_of(whole_run[0] / "a.csv")
    assert sorted(os.listdir(tmp_path)) == ["a.best.ckpt", "a.ckpt", "a.csv"]


@pytest.mark.parametrize(("began", "moved_to"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_resume_on_another_machine_goes_on_in_the_same_arithmetic(
    data, tmp_path, monkeypatch, capsys, began, moved_to
):
    def machine(arithmetic):
        found = {"avx512_bf16": arithmetic == "bfloat16"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    machine(began)
    run(data, tmp_path / "whole.ckpt")
    with pytest.raises(StoppedHereError):
        run(data, tmp_path / "a.ckpt", recipe={**RECIPE, "save_every": 0}, on_step=stop_at(4))
    machine(moved_to)
    run(data, tmp_path / "a.ckpt", resume=True, progress=True)
    assert f"epoch 1, step 4, {began}" in capsys.readouterr().err
    assert same(weights(tmp_path / "a.ckpt"), weights(tmp_path / "whole.ckpt"))
    assert read_checkpoint(tmp_path / "a.ckpt").metrics["arithmetic"] == began
    run(data, tmp_path / "b.ckpt")
    assert not same(weights(tmp_path / "b.ckpt"), weights(tmp_path / "whole.ckpt"))


def test_the_best_accuracy_outlives_a_resume(data, tmp_path):
    found = []
    with pytest.raises(StoppedHereError):
        run(data, tmp_path / "a.ckpt", recipe={**RECIPE, "save_every": 0}, on_step=stop_at(STEPS + 1))
    run(data, tmp_path / "a.ckpt", resume=True, on_step=[lambda trainer: found.append(trainer.best)])
    assert found[0] == pytest.approx(float(rows_of(tmp_path / "a.csv")[0]["test_accuracy"]), rel=1e-4)


def test_resume_of_a_vit_at_the_end_of_an_epoch(data, tmp_path):
    def stop(epoch, networks):
        if epoch == 2:  # the state is that of the end of epoch 1
            raise StoppedHereError

    run(data, tmp_path / "whole.ckpt", "vit")
    with pytest.raises(StoppedHereError):
        run(data, tmp_path / "a.ckpt", "vit", on_epoch_end=[stop])
    run(data, tmp_path / "a.ckpt", "vit", resume=True)
    assert same(weights(tmp_path / "a.ckpt"), weights(tmp_path / "whole.ckpt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(data, whole_run, tmp_path, number):
    handler = signal.getsignal(number)
    with pytest.raises(TrainingInterruptedError, match="stopped in epoch 1 of 2; --resume"):
        run(data, tmp_path / "a.ckpt", on_step=stop_at(3, number))
    assert signal.getsignal(number) is handler
    assert os.listdir(tmp_path) == ["a.state"]
    run(data, tmp_path / "a.ckpt", resume=True)
    assert same(weights(tmp_path / "a.ckpt"), weights(whole_run[1].path))


def test_resume_with_nothing_there_starts(data, whole_run, tmp_path):
    run(data, tmp_path / "a.ckpt", resume=True)
    assert same(weights(tmp_path / "a.ckpt"), weights(whole_run[1].path))


def test_resume_of_a_finished_training_returns_it(data, tmp_path):
    result = run(data, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").stat().st_mtime_ns
    again = run(data, tmp_path / "a.ckpt", resume=True)
    assert again.metrics["test_accuracy"] == result.metrics["test_accuracy"]
    assert (tmp_path / "a.ckpt").stat().st_mtime_ns == before
    with pytest.raises(FourierBiasError, match="trained with epochs 2, not 3"):
        run(data, tmp_path / "a.ckpt", recipe={**RECIPE, "epochs": 3}, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {**RECIPE, "lr": 0.1}}, "trained with lr 0.003, not 0.1"),
        ({"recipe": {**RECIPE, "seed": 5}}, "trained with seed 0, not 5"),
        ({"model_args": {**TINY["cnn"], "layers": (1, 1, 1, 2)}}, "trained with arch_args"),
        ({"learner": lambda model, recipe: Classifier(model, 0.3)}, "trained with learner"),
    ],
)
def test_resume_with_other_settings_is_refused(data, tmp_path, change, message):
    with pytest.raises(StoppedHereError):
        run(data, tmp_path / "a.ckpt", recipe={**RECIPE, "save_every": 0}, on_step=stop_at(2))
    with pytest.raises(FourierBiasError, match=message):
        run(data, tmp_path / "a.ckpt", resume=True, **change)
    other = Data(
        data.train.take(torch.arange(100)),
        data.evaluation,
        data.classes,
        {**data.description, "fingerprint": "x"},
    )
    with pytest.raises(FourierBiasError, match="trained with data"):
        run(other, tmp_path / "a.ckpt", resume=True)


def test_what_exists_is_not_lost(data, tmp_path):
    path = tmp_path / "a.ckpt"
    with pytest.raises(StoppedHereError):
        run(data, path, recipe={**RECIPE, "save_every": 0}, on_step=stop_at(2))
    with pytest.raises(FourierBiasError, match="--resume or --overwrite"):
        run(data, path)
    run(data, path, overwrite=True)
    before = path.read_bytes()
    with pytest.raises(FourierBiasError, match=r"a\.ckpt exists: give --overwrite"):
        run(data, path)
    with pytest.raises(FourierBiasError, match="give one of them"):
        run(data, path, resume=True, overwrite=True)
    assert path.read_bytes() == before


def test_a_damaged_state_is_said(data, tmp_path):
    (tmp_path / "a.state").write_bytes(b"nothing")
    with pytest.raises(FourierBiasError, match=r"a\.state is damaged"):
        run(data, tmp_path / "a.ckpt", resume=True)
    torch.save({"x": 1}, tmp_path / "a.state")
    with pytest.raises(FourierBiasError, match="no training state"):
        run(data, tmp_path / "a.ckpt", resume=True)


KILLED = """
import sys
from fourierbias.training.recipe import Recipe
from fourierbias.training.trainer import train
train("cnn", "photos", sys.argv[1], Recipe(epochs=2, batch_size=16, fraction=0.02, save_every=0), resume=True,
      model_args={"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1)}, progress=False)
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    path, draw = tmp_path / "a.ckpt", random.Random(0)
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "whole.ckpt"], check=True)
    killed = 0
    while killed < 12:
        process = subprocess.Popen([sys.executable, "-c", KILLED, path])
        while process.poll() is None and not path.with_suffix(".state").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1))
        process.kill()
        process.wait()
        killed += 1
        for file in tmp_path.glob("a*.ckpt"):
            build(read_checkpoint(file))
        if path.exists() and not path.with_suffix(".state").exists():
            assert same(weights(path), weights(tmp_path / "whole.ckpt"))
            for file in tmp_path.glob("a.*"):
                file.unlink()
    subprocess.run([sys.executable, "-c", KILLED, path], check=True)
    assert same(weights(path), weights(tmp_path / "whole.ckpt"))


# ------------------------------------------------------------------------------------------------ switch

SWITCHING = {"epochs": 3, "batch_size": 32, "lr": 3e-3, "evaluate_every": 3}


def prs(data, path, schedule, **options):
    recipe = {**SWITCHING, "schedule": schedule, **options.pop("recipe", {})}
    return run(data, path, "prs", recipe, **options)


def test_prs_that_never_switches_is_the_cnn(data, tmp_path):
    run(data, tmp_path / "cnn.ckpt", recipe=SWITCHING)
    prs(data, tmp_path / "prs.ckpt", "conv")
    assert same(weights(tmp_path / "cnn.ckpt"), weights(tmp_path / "prs.ckpt"))


@pytest.mark.parametrize("schedule", ["attention", "uniform:1", "late-first", "early-first"])
def test_resume_across_a_switch_ends_with_the_same_bits(data, tmp_path, schedule):
    whole, path = tmp_path / "whole.ckpt", tmp_path / "a.ckpt"
    prs(data, whole, schedule, recipe={"gate_lr": 10.0})
    recipe = {"gate_lr": 10.0, "save_every": 0}
    for update in (2, STEPS, STEPS + 2, 2 * STEPS + 1):  # one training, stopped again and again
        with pytest.raises(StoppedHereError):
            prs(data, path, schedule, recipe=recipe, resume=update > 2, on_step=stop_at(update))
    prs(data, path, schedule, recipe={"gate_lr": 10.0}, resume=True)
    assert same(weights(path), weights(whole))
    assert rows_of(tmp_path / "a.csv") == rows_of(tmp_path / "whole.csv")
    assert rows_of(tmp_path / "a.layers.csv") == rows_of(tmp_path / "whole.layers.csv")


@pytest.mark.parametrize(
    ("opt", "moment", "kept"), [("nmuon", "momentum_buffer", 0.95), ("adamw", "exp_avg", 0.9)]
)
def test_a_switch_is_smooth_logged_and_followed_by_optimiser_and_average(data, tmp_path, opt, moment, kept):
    seen = []

    def watch(trainer):
        groups = trainer.optimizer.param_groups
        owned = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(owned) == sorted(id(parameter) for parameter in trainer.learner.parameters())
        averaged = trainer.ema.module.state_dict()
        assert averaged.keys() == trainer.learner.state_dict().keys()
        if trainer.updates_done == STEPS:
            seen.append({key: value.clone() for key, value in averaged.items()})
            seen.append(momentum(trainer).clone())
        if trainer.updates_done == STEPS + 1:  # the first step after the switch
            last = seen[0]["model.layer3.0.conv1.weight"]
            moved = (averaged["model.layer3.0.conv1.weight"] - last).abs().max()
            current = trainer.learner.state_dict()["model.layer3.0.conv1.weight"]
            assert moved < 0.5 * (current - last).abs().max()  # the average went on, it did not start anew
            gates = [group for group in groups if group.get("lr_scale") == 10.0]
            assert len(gates) == 1
            assert gates[0]["weight_decay"] == 0.0
            assert gates[0]["lr"] == pytest.approx(10 * groups[0]["lr"])
            assert [p.shape for p in gates[0]["params"]] == [(9,)] * 4
            # The momentum went on from what it was: a new one would be the last gradient's share alone.
            share = (
                torch.linalg.vecdot(momentum(trainer).flatten(), seen[1].flatten()) / seen[1].square().sum()
            )
            assert share > 0.5 * kept
            if opt == "adamw":
                assert state(trainer)["step"] == STEPS + 1

    def state(trainer):
        return trainer.optimizer.state[trainer.learner.networks[""].layer3[0].conv1.weight]

    def momentum(trainer):
        return state(trainer)[moment]

    recipe = {"gate_lr": 10.0, "opt": opt}
    result = prs(data, tmp_path / "a.ckpt", "uniform:1", recipe=recipe, on_step=[watch])
    assert [len(row["switched"].split()) for row in result.history] == [0, 4, 0]
    assert 0 <= result.history[1]["logit_change"] < 1e-4
    rows = rows_of(tmp_path / "a.layers.csv", without=())
    assert [row["form"] for row in rows] == ["conv"] * 4 + ["attention"] * 8
    assert all(float(row["gate"]) == 0.0 for row in rows[:4])
    assert all(float(row["gate"]) != 0.0 for row in rows[8:])
    assert set(rows[0]) >= {"epoch", "layer", "form", "gate", "content_share", "attention_distance"}
    rebuilt = build(read_checkpoint(tmp_path / "a.ckpt"))
    assert rebuilt.layer4[0].conv2.is_attention
    assert evaluate(rebuilt, data)["accuracy"] == result.metrics["test_accuracy"]


def test_a_switch_has_the_recipes_settings(data, tmp_path):
    def look(trainer):
        query = trainer.learner.networks[""].layer4[0].conv1.query
        (group,) = (g for g in trainer.optimizer.param_groups if any(p is query for p in g["params"]))
        assert group["weight_decay"] == 0.07

    recipe = {"epochs": 1, "gate": "sigmoid", "locality": 6.0, "weight_decay": 0.07}
    prs(data, tmp_path / "a.ckpt", "attention", recipe=recipe, on_step=[look])
    layer = build(read_checkpoint(tmp_path / "a.ckpt")).layer4[0].conv1
    assert (layer.gate_kind, layer.locality) == ("sigmoid", 6.0)


def test_a_schedule_by_stage_switches_stages(data, tmp_path):
    prs(data, tmp_path / "a.ckpt", "late-first", recipe={"schedule_by": "stage"})
    switched = [row["switched"].split() for row in rows_of(tmp_path / "a.csv")]
    assert [{name.split(".")[0] for name in names} for names in switched if names] == [{"layer4"}, {"layer3"}]


def test_a_schedule_needs_layers_that_can_switch(data, tmp_path):
    with pytest.raises(FourierBiasError, match="train prs, or name with --recast"):
        run(data, tmp_path / "a.ckpt", recipe={**SWITCHING, "schedule": "late-first"})


def test_recast_layers_are_trained_saved_and_resumed(data, tmp_path):
    options = {"recast": {"layers": ["layer4.*"]}, "recipe": SWITCHING}
    run(data, tmp_path / "whole.ckpt", **options)
    with pytest.raises(StoppedHereError):
        run(
            data,
            tmp_path / "a.ckpt",
            recast=options["recast"],
            recipe={**SWITCHING, "save_every": 0},
            on_step=stop_at(8),
        )
    run(data, tmp_path / "a.ckpt", **options, resume=True)
    assert same(weights(tmp_path / "a.ckpt"), weights(tmp_path / "whole.ckpt"))
    assert build(read_checkpoint(tmp_path / "a.ckpt")).layer4[0].conv1.gate.abs().max() > 0


def test_a_schedule_over_layers_of_any_network(data, tmp_path):
    options = {"recast": {"layers": ["layer4.*"]}, "recipe": {**SWITCHING, "schedule": "uniform:1"}}
    run(data, tmp_path / "whole.ckpt", **options)
    stopping = {"on_step": stop_at(8), "recipe": {**options["recipe"], "save_every": 0}}
    with pytest.raises(StoppedHereError):
        run(data, tmp_path / "a.ckpt", **{**options, **stopping})
    run(data, tmp_path / "a.ckpt", **options, resume=True)
    assert same(weights(tmp_path / "a.ckpt"), weights(tmp_path / "whole.ckpt"))
    assert [row["switched"] for row in rows_of(tmp_path / "a.csv")] == [
        "",
        "layer4.0.conv1 layer4.0.conv2",
        "",
    ]
    assert build(read_checkpoint(tmp_path / "a.ckpt")).layer4[0].conv1.is_attention
    never = {**options, "recipe": {**SWITCHING, "schedule": "conv"}}
    run(data, tmp_path / "never.ckpt", **never)
    assert not build(read_checkpoint(tmp_path / "never.ckpt")).layer4[0].conv1.is_attention


@pytest.mark.parametrize("made", [create, timm.create_model])
def test_a_network_recast_in_python_is_trained_and_read_again(data, tmp_path, made):
    network = recast(recast(made("cnn", num_classes=16), "layer4.1", gate="sigmoid"), "layer4.0.conv2")
    recipe = Recipe(epochs=1, batch_size=32)
    result = train(network, data, tmp_path / "a.ckpt", recipe, device="cpu", progress=False)
    layers = reparam_layers(build(read_checkpoint(result.path)))
    assert {name: layer.gate_kind for name, layer in layers.items()} == {
        "layer4.0.conv2": "linear", "layer4.1.conv1": "sigmoid", "layer4.1.conv2": "sigmoid",
    }  # fmt: skip


def test_a_network_that_could_not_be_read_again_is_refused(data, tmp_path):
    network = timm.create_model("vit", num_classes=16, depth=2)
    with pytest.raises(FourierBiasError, match=r"could not be read again.*make it with models\.checkpoint"):
        train(network, data, tmp_path / "a.ckpt", Recipe(epochs=1), device="cpu", progress=False)
    for options in ({"recast": {"layers": ["layer4"]}}, {"model_args": {"depth": 2}}):
        with pytest.raises(FourierBiasError, match=f"{next(iter(options))} is for a network given by name"):
            train(create("cnn", num_classes=16), data, tmp_path / "a.ckpt", device="cpu", **options)
    assert not list(tmp_path.iterdir())


def test_an_odd_batch_is_mixed(data, tmp_path):
    """An image that cannot be read leaves an odd number, and mixing wants pairs."""

    def shorten(run):
        if run.step == 2:
            update = run.update
            run.update = lambda images, targets: update(images[:-1], targets[:-1])

    result = run(data, tmp_path / "a.ckpt", recipe={**RECIPE, "epochs": 1}, on_step=[shorten])
    assert math.isfinite(result.metrics["train_loss"])


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("opt", ["foo", "adahessian", "fusedadam"])
def test_optimisers_that_cannot_be(data, tmp_path, opt):
    with pytest.raises(FourierBiasError, match=f"optimiser {opt} cannot be used; nmuon"):
        run(data, tmp_path / "a.ckpt", recipe={**RECIPE, "opt": opt})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_devices_that_cannot_be(data, tmp_path, device):
    with pytest.raises(FourierBiasError, match=f"device {device} cannot be used"):
        run(data, tmp_path / "a.ckpt", device=device)


def test_a_loss_that_is_not_finite(data, tmp_path):
    class Broken(Classifier):
        def loss(self, images, targets, progress):
            loss, metrics = super().loss(images, targets, progress)
            return loss * (float("nan") if progress > 0 else 1), metrics

    with pytest.raises(FourierBiasError, match="loss is nan in epoch 2, step 1; use a lower learning rate"):
        run(data, tmp_path / "a.ckpt", learner=lambda model, recipe: Broken(model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 33, "mixup": 0.1}, "even batch_size"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"warmup_epochs": math.inf}, "warmup_epochs must be at least 0, and finite"),
        ({"min_lr": 1.0}, "min_lr must be between 0 and lr"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\]"),
        ({"fraction": 1.5}, "fraction"),
        ({"holdout": -1}, "holdout"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"ema": 1.0}, "ema"),
        ({"amp": "float16"}, "one of auto, bfloat16, float32"),
        ({"seed": -1}, "seed"),
        ({"image_size": 4}, "image_size"),
        ({"schedule_by": "block"}, "layer or stage"),
        ({"gate": "relu"}, "linear or sigmoid"),
        ({"locality": 0.0}, "locality"),
        ({"evaluate_every": 0}, "evaluate_every"),
    ],
)
def test_recipes_that_cannot_be(values, message):
    with pytest.raises(FourierBiasError, match=message):
        Recipe(**values)


def test_models_and_places_that_cannot_be(data, tmp_path):
    (tmp_path / "file").touch()
    for arguments, message in (
        (("cnm", data, tmp_path / "a.ckpt"), "no architecture called 'cnm'"),
        (("cnn", data, tmp_path), "is a folder; name the checkpoint"),
        (("cnn", data, tmp_path / "file" / "a.ckpt"), "cannot write into"),
        (("cnn", "nowhere", tmp_path / "a.ckpt"), "no data at nowhere"),
        ((timm.create_model("cnn"), data, tmp_path / "a.ckpt"), "model has 10 classes, the data have 16"),
    ):
        with pytest.raises(FourierBiasError, match=message):
            train(*arguments, Recipe(epochs=1), progress=False)
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------ parts


def test_a_network_of_timm_and_another_image_size(data, tmp_path):
    model = timm.create_model("cnn", num_classes=16)
    train(model, data, tmp_path / "m", Recipe(epochs=1, evaluate_every=9), device="cpu", progress=False)
    assert read_checkpoint(tmp_path / "m.ckpt").arch == "cnn"
    recipe = {"epochs": 1, "fraction": 0.01, "image_size": 16}
    run("photos", tmp_path / "v.ckpt", "vit", recipe)
    checkpoint = read_checkpoint(tmp_path / "v.ckpt")
    assert checkpoint.preprocessing["input_size"] == (3, 16, 16)
    assert build(checkpoint)(torch.randn(1, 3, 16, 16)).shape == (1, 16)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_counts_what_is_right_and_keeps_the_mode(data, training):
    model = create("cnn", num_classes=16, **TINY["cnn"]).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = evaluate(model, data, batch_size=7)
    assert model.training is training
    assert same(before, model.state_dict())
    model.double().eval()
    images = torch.cat([images for images, _ in evaluation_batches(data.evaluation)]).double()
    logits, labels = model(images), data.evaluation.labels
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    nats = -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(len(labels)), labels].mean()
    assert found["loss"] == pytest.approx(nats.item(), rel=1e-5)


def test_evaluation_with_too_few_classes(data):
    with pytest.raises(FourierBiasError, match="2 classes, the images more"):
        evaluate(create("cnn", num_classes=2, **TINY["cnn"]), data)


class Pair(Learner):
    """A network and one that shares its body, as Bootstrapping's do."""

    def __init__(self, model):
        super().__init__()
        self.main = model
        self.other = create("cnn", num_classes=16, **TINY["cnn"])
        self.other.layer3 = model.layer3

    @property
    def networks(self):
        return {"": self.main, "other": self.other}

    def loss(self, images, targets, progress):
        logits = [network(images) for network in self.networks.values()]
        loss = sum(F.cross_entropy(x.float(), targets) for x in logits)
        return loss, {"accuracy": batch_accuracy(logits[0], targets), "progress": progress}


def test_several_networks_that_share_weights(data, tmp_path):
    def check(trainer):
        averaged = trainer.networks
        assert averaged[""].layer3 is averaged["other"].layer3
        assert averaged[""].layer3 is not trainer.learner.networks[""].layer3

    result = run(data, tmp_path / "a.ckpt", learner=lambda model, recipe: Pair(model), on_step=[check])
    assert {"other_test_accuracy", "progress"} <= result.metrics.keys()
    assert [row["progress"] for row in result.history] == [0.0, 0.5]
    main, other = (weights(tmp_path / name) for name in ("a.ckpt", "a.other.ckpt"))
    for key in main:
        assert torch.equal(main[key], other[key]) == (key.startswith("layer3") or "num_batches" in key)
    assert evaluate(build(read_checkpoint(tmp_path / "a.other.ckpt")), data)["accuracy"] == pytest.approx(
        result.metrics["other_test_accuracy"]
    )
    with pytest.raises(StoppedHereError):
        run(
            data,
            tmp_path / "b.ckpt",
            recipe={**RECIPE, "save_every": 0},
            learner=lambda model, recipe: Pair(model),
            on_step=stop_at(5),
        )
    run(data, tmp_path / "b.ckpt", learner=lambda model, recipe: Pair(model), resume=True)
    assert same(weights(tmp_path / "b.other.ckpt"), other)


def test_average_moves_every_tensor_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(3)

    model = Twice()
    ema = LearnerEma(model, decay=0.9)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
        model.norm.running_mean += 10
        model.norm.num_batches_tracked += 4
    ema.update(model)
    after = ema.module.state_dict()
    torch.testing.assert_close(after["a.weight"], start["a.weight"] + 0.1)
    torch.testing.assert_close(after["norm.running_mean"], start["norm.running_mean"] + 1)
    assert after["norm.num_batches_tracked"] == 4
