"""Training on several processes: the same losses as on one, the same weights on all, stops and errors shared.

Run by torchrun this file is the program of each process; run by pytest it starts them and compares.
"""

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fourierbias import distributed
from fourierbias.errors import FourierBiasError
from fourierbias.models.checkpoint import build, read_checkpoint
from fourierbias.training.bootstrap import bootstrap
from fourierbias.training.data import Data, Split
from fourierbias.training.parallel import GlobalBatchNorm
from fourierbias.training.recipe import Recipe
from fourierbias.training.trainer import TrainingInterruptedError, train

CNN = {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)}
VIT = {"embed_dim": 36, "depth": 2, "num_heads": 3}
NINE = {"embed_dim": 36, "depth": 2, "num_heads": 9}  # heads that an agent's kernel can hold
RECIPE = {"epochs": 2, "batch_size": 16, "lr": 1e-3, "amp": "float32", "evaluate_every": 2}
STEPS = 4  # in an epoch
SCENARIOS = {
    "cnn": ("cnn", CNN, {}, None),
    "uneven": ("cnn", CNN, {"batch_size": 15}, None),
    "vit": ("vit", VIT, {}, None),
    "timm": ("test_efficientnet", {}, {}, None),  # whose batch normalisation has an activation in it
    "mixed": ("cnn", CNN, {"batch_size": 14, "mixup": 0.2, "cutmix": 1.0}, None),
    "prs": ("prs", CNN, {"schedule": "late-first", "gate_lr": 10.0}, None),
    "joint": ("vit", NINE, {}, bootstrap("joint")),
    "shared": ("vit", NINE, {}, bootstrap("shared")),
}


class StoppedHereError(Exception):
    pass


def random_data():
    """64 random images of three classes to train on, 20 to evaluate on."""
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    pixels = torch.randint(
        0, 256, (84, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    labels, names = torch.arange(84) % 3, [f"{i:02d}" for i in range(84)]
    parts = slice(64), slice(64, 84)
    splits = [Split(labels[part], names[part], preprocessing, pixels=pixels[part]) for part in parts]
    return Data(*splits, list("abc"), {"source": "random", "evaluated_on": "test", "fingerprint": "none"})


def run(path, scenario, hooks=(), **options):
    model, arguments, changes, learner = SCENARIOS[scenario]
    recipe = Recipe(**{**RECIPE, **changes, **options.pop("recipe", {})})
    options = {"model_args": arguments, "learner": learner, "device": "cpu", "progress": False, **options}
    return train(model, random_data(), path, recipe, on_step=hooks, **options)


def record(folder, scenario):
    """Train, and return each step's loss, hashes of all weights on each process, and what was evaluated."""
    losses, digests, before = [], [], 0.0

    def watch(trainer):
        nonlocal before
        total = trainer.sums["loss"].item()
        count = trainer.sums["images"].item() / trainer.step
        losses.append((total - (before if trainer.step > 1 else 0.0)) / count)
        before = total
        if trainer.updates_done == trainer.updates:
            modules = trainer.learner, trainer.ema.module
            digests.extend(distributed.gather([digest(module.state_dict()) for module in modules]) or [])

    result = run(folder / f"{scenario}.ckpt", scenario, [watch])
    return {"losses": losses, "digests": digests, "metrics": result.metrics}


def digest(state):
    content = b"".join(key.encode() + value.numpy().tobytes() for key, value in sorted(state.items()))
    return hashlib.sha256(content).hexdigest()


def same(a, b):
    a, b = (read_checkpoint(path).state_dict for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ----------------------------------------------------------------------------- what each process does


def stop_and_resume(folder):
    """Stop a PRS training again and again, by an exception on all and by a signal to the last; resume."""
    path, last = folder / "again.ckpt", distributed.rank() == distributed.world_size() - 1

    def stop(trainer):
        if trainer.updates_done == STEPS + 2:
            raise StoppedHereError

    def ask(trainer):
        if trainer.updates_done == STEPS + 3 and last:
            os.kill(os.getpid(), signal.SIGTERM)

    said = []
    for hook in (stop, ask):
        try:
            run(path, "prs", [hook], resume=True, recipe={"save_every": 0})
        except (StoppedHereError, TrainingInterruptedError) as stopped:
            said.append(str(stopped))
    run(path, "prs", resume=True)
    again = run(path, "prs", resume=True)  # it has ended, and is returned
    return {"said": distributed.gather(said), "accuracy": distributed.gather(again.metrics["test_accuracy"])}


def normalise(folder):
    """Normalise unequal parts of a batch; return what is left, from outputs, gradients and statistics."""
    found = {}
    for name, module in NORMS.items():
        x, target = batch_of(module)
        part = slice(0, 5) if distributed.is_first() else slice(5, 6)
        own = x[part].clone().requires_grad_()
        with GlobalBatchNorm():
            y = module(own)
        (y * target[part]).sum().backward()
        found[name] = distributed.gather(
            {
                "y": y.tolist(),
                "dx": own.grad.tolist(),
                **{key: value.grad.tolist() for key, value in module.named_parameters()},
                **{key: value.tolist() for key, value in module.named_buffers()},
            }
        )
    return found


def errors(folder):
    """Fail on one process in what all do; return what each of them hears of it."""
    heard = []
    model, only = SCENARIOS["cnn"][0], distributed.rank() == 1
    attempts = {
        "learner": lambda: run(folder / "e.ckpt", "cnn", learner=broken if only else None),
        "data": lambda: train(
            model, other_data() if only else random_data(), folder / "e.ckpt", progress=False
        ),
        "batch": lambda: run(folder / "e.ckpt", "mixed", recipe={"batch_size": 2}),
        "first": lambda: run(folder / "e.ckpt", "cnn", on_epoch_end=[refuse]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except FourierBiasError as error:
            heard.append([name, str(error)])
    return {"heard": distributed.gather(heard), "left": sorted(path.name for path in folder.glob("*e.*"))}


def broken(model, recipe):
    raise FourierBiasError("only here")


def refuse(epoch, networks):
    assert distributed.world_size() == 1  # the others wait
    raise FourierBiasError("no room")


def other_data():
    data = random_data()
    data.description["fingerprint"] = "other"
    return data


def work(folder):
    torch.set_num_threads(1)
    with distributed.session():
        found = {scenario: record(folder, scenario) for scenario in SCENARIOS}
        for part in (stop_and_resume, normalise, errors):
            found[part.__name__] = part(folder)
        if distributed.is_first():
            (folder / "found.json").write_text(json.dumps(found))


NORMS = {
    "plain": nn.BatchNorm2d(4),
    "no affine": nn.BatchNorm1d(4, affine=False, eps=1e-3),
    "cumulative": nn.BatchNorm3d(4, momentum=None),
    "no statistics": nn.BatchNorm2d(4, track_running_stats=False),
}


def batch_of(module):
    """Six images for a normalisation, and weights of its outputs; its parameters are drawn, too."""
    generator = torch.Generator().manual_seed(7)
    sides = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 3), nn.BatchNorm3d: (2, 3, 2)}[type(module)]
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return (torch.randn(6, 4, *sides, generator=generator) * s + m for s, m in ((3, 5), (1, 0)))


# -------------------------------------------------------------------------------------- what is compared


def torchrun(*words, processes=2, cwd=None):
    """Start processes by torchrun; return its exit status and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder):
    """What two processes found."""
    ended = torchrun(__file__, folder)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    return {scenario: record(folder, scenario) for scenario in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_follow_the_losses_of_one(found, by_one, scenario):
    one, two = by_one[scenario], found[scenario]
    assert len(two["losses"]) == 2 * STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4, rel=1e-4)  # a hint adds forty to the loss
    assert two["metrics"]["train_loss"] == pytest.approx(one["metrics"]["train_loss"], abs=1e-4)
    assert two["metrics"]["test_loss"] == pytest.approx(one["metrics"]["test_loss"], abs=1e-3)
    assert two["metrics"]["train_accuracy"] == pytest.approx(one["metrics"]["train_accuracy"], abs=1 / 64)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_processes_end_with_the_same_weights(found, scenario):
    first, second = found[scenario]["digests"]
    assert first == second


def test_prs_switches_on_the_way(found, folder):
    with open(folder / "prs.csv") as file:
        switched = [row["switched"].split() for row in csv.DictReader(file)]
    assert [len(names) for names in switched] == [2, 2]  # all four, in the last epoch at the latest


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_file_is_that_of_an_ordinary_network(found, folder, scenario):
    network = build(read_checkpoint(folder / f"{scenario}.ckpt"))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert bool(norms) == (SCENARIOS[scenario][0] != "vit")
    assert all(module.num_batches_tracked == 2 * STEPS for module in norms)


def test_a_training_stopped_on_any_process_goes_on_to_the_same_bits(found, folder):
    said = found["stop_and_resume"]["said"]
    assert said == [["", "stopped in epoch 2 of 2; --resume goes on from here"]] * 2
    assert len(set(found["stop_and_resume"]["accuracy"])) == 1
    assert same(folder / "again.ckpt", folder / "prs.ckpt")
    assert not (folder / "again.state").exists()


@pytest.mark.parametrize("name", NORMS)
def test_batch_normalisation_of_unequal_parts_is_that_of_the_whole(found, name):
    module = NORMS[name]
    x, target = batch_of(module)
    x.requires_grad_()
    y = module(x)
    (y * target).sum().backward()
    first, second = found["normalise"][name]
    for key, expected in {"y": y, "dx": x.grad}.items():
        torch.testing.assert_close(torch.tensor(first[key] + second[key]), expected)
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(torch.tensor(first[key]) + torch.tensor(second[key]), parameter.grad)
    for key, buffer in module.named_buffers():
        assert first[key] == second[key]
        torch.testing.assert_close(torch.tensor(first[key]), buffer)


def test_evaluation_mode_is_left_alone():
    module, x = nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4)
    with GlobalBatchNorm():
        assert torch.equal(module(x), F.batch_norm(x, torch.zeros(3), torch.ones(3)))


def test_an_error_on_one_process_is_raised_on_all(found):
    first, second = (dict(heard) for heard in found["errors"]["heard"])
    assert first == second
    assert first == {
        "learner": "only here",
        "data": "processes must be given the same, they differ in data",
        "batch": "a batch of 2 images cannot be shared by 2 processes; "
        "use a larger batch size or fewer processes",
        "first": "no room",
    }
    assert found["errors"]["left"] == []


# ------------------------------------------------------------------------------------- the command line

SMALL = ("--epochs", 2, "--fraction", 0.02, "--holdout", 32, "--batch-size", 16)


def test_the_command_line_trains_prs_across_its_switches(tmp_path):
    words = ("train", "prs", "--schedule", "uniform:1", *SMALL, "--probe", 2, "-o", "prs.ckpt")
    ended = torchrun("-m", "fourierbias", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Wrote prs.ckpt") == 1
    assert ended.stderr.count("epoch 2/2") == 1
    assert "2 processes, cpu" in ended.stderr
    assert sorted(os.listdir(tmp_path)) == [
        "prs.best.ckpt",
        "prs.ckpt",
        "prs.csv",
        "prs.layers.csv",
        "prs.probe.h5",
    ]
    network = build(read_checkpoint(tmp_path / "prs.ckpt"))
    assert network.layer4[0].conv2.is_attention


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schedule", "nonsense"), "no schedule 'nonsense'"),
        pytest.param(("--sheduel", "x"), "No such option '--sheduel'", marks=pytest.mark.slow),
        pytest.param(("--batch-size", "1"), "batch_size must be at least 2", marks=pytest.mark.slow),
        pytest.param(("--data", "nowhere"), "no data at nowhere", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_said_once(tmp_path, words, message):
    ended = torchrun("-m", "fourierbias", "train", "prs", *SMALL, *words, cwd=tmp_path)
    assert ended.returncode != 0
    said = re.findall("^Error: (.*)", ended.stderr, re.MULTILINE)
    assert len(said) == 1, ended.stderr
    assert said[0].startswith(message)
    assert "[rank" not in ended.stderr  # no traceback of a process
    assert set(re.findall(r"exitcode +: (-?\d+)", ended.stderr)) == {"2"}
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, sys
from fourierbias import distributed
from fourierbias.cli import main
from fourierbias.errors import FourierBiasError
from fourierbias.training import trainer

def act(run):
    if distributed.rank() == 1 and run.updates_done == 4:
        {what}

train = trainer.train
trainer.train = lambda *args, **options: train(*args, **options, on_step=[act])
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("raise FourierBiasError('it broke here')", "it broke here"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "another process of this run has ended"),
    ],
)
def test_all_end_where_one_does_and_the_reason_is_said_once(tmp_path, what, reason):
    (tmp_path / "program.py").write_text(KILLED.format(what=what))
    words = ("train", "cnn", *SMALL, "--save-every", 0, "-o", "out/a.ckpt")
    started = time.monotonic()
    ended = torchrun("program.py", *words, cwd=tmp_path)
    assert ended.returncode != 0
    assert time.monotonic() - started < 60
    said = re.findall("^Error: (.*)", ended.stderr, re.MULTILINE)
    assert len(said) == 1
    assert said[0].startswith(reason)
    assert os.listdir(tmp_path / "out") == ["a.state"]
    ended = torchrun("-m", "fourierbias", *words, "--resume", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "going on from out/a.state: epoch 1, step 4" in ended.stderr
    whole = torchrun("-m", "fourierbias", *words[:-1], "whole.ckpt", cwd=tmp_path)
    assert whole.returncode == 0
    assert same(tmp_path / "out/a.ckpt", tmp_path / "whole.ckpt")


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_and_stops(tmp_path):
    words = ["train", "cnn", *map(str, SMALL), "--epochs", "500", "-o", "a.ckpt"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, "-m", "fourierbias", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "a.state").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert len(re.findall(r"^stopped in epoch \d+ of 500; --resume goes on", said, re.MULTILINE)) == 1
    assert (tmp_path / "a.state").exists()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
