"""Cards of checkpoints, from what the files say of themselves: command, data, accuracy.

python examples/cards.py checkpoints/*.ckpt > checkpoints/README.md
"""

import dataclasses
import inspect
import sys
from pathlib import Path

from fourierbias.models.checkpoint import Checkpoint, read_checkpoint
from fourierbias.training import Recipe
from fourierbias.training.bootstrap import AGENT, Bootstrap

INTRODUCTION = """# The checkpoints that ship

Made by the commands below, and shown by `fourierbias plot --compare`; `make checkpoints DATA=cifar10` makes
the whole set by the recipe of today.
Accuracies are those of the last epoch on the test images, never of the best one; they are recomputed by
`fourierbias evaluate checkpoints/*.ckpt --data DATA`. CIFAR-10 (JPEG) is CIFAR-10 with every image stored as
a JPEG of quality 75: numbers made from it are not comparable with published CIFAR-10 figures. `DATA` is its
folder, with `train/` and `test/`. The log of each training lies beside its checkpoint.

Training speeds are means over all epochs, on one core of a Xeon with AVX-512 (the bootstrapped pair
had two for its last four epochs), other work going on.
"""


def command(name: str, checkpoint: Checkpoint) -> str:
    """The command line that made a checkpoint: its recipe where it differs from the default one."""
    learner = checkpoint.recipe["learner"]
    bootstrapped = learner["name"] == "Bootstrap"
    words = ["fourierbias train", "bootstrap" if bootstrapped else checkpoint.arch, "--data DATA"]
    if bootstrapped:
        given = inspect.signature(Bootstrap).parameters
        for option in ("mode", "alignment", "hint_weight"):
            if learner[option] != given[option].default:
                words.append(f"--{option.replace('_', '-')} {learner[option]}")
        name = name.replace(f".{AGENT}.ckpt", ".ckpt")  # one command writes both
    for field in dataclasses.fields(Recipe):
        value = checkpoint.recipe.get(field.name, field.default)
        if value != field.default:
            words.append(f"--{field.name.replace('_', '-')} {value}")
    if checkpoint.dtype == "float16":
        words.append("--half")
    return " ".join([*words, f"-o {name}"])


def card(path: Path) -> str:
    """The section of one checkpoint."""
    checkpoint = read_checkpoint(path)
    metrics, recipe = checkpoint.metrics, checkpoint.recipe
    rows = {
        "command": f"`{command(path.name, checkpoint)}`",
        "data": "CIFAR-10 (JPEG), 50,000 training and 10,000 test images",
        "seed, epochs": f"{recipe['seed']}, {checkpoint.epoch}",
        "parameters": f"{metrics['parameters']:,}",
        "test accuracy": f"{100 * metrics['test_accuracy']:.2f} %",
        "training speed": f"{metrics['images_per_second']:.0f} images/s",
        "weights": f"{checkpoint.weights}; stored as {checkpoint.dtype}, {path.stat().st_size / 1e6:.1f} MB",
        "version": f"fourierbias {checkpoint.version}",
    }
    return f"## {path.name}\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in rows.items())


if __name__ == "__main__":
    print(INTRODUCTION)
    print("\n".join(card(Path(name)) for name in sys.argv[1:]), end="")
