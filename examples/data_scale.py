"""At how much data does a network with less of a convolution's bias pass a CNN?

PRS (Lee et al., arXiv 2210.01370, abstract) has it that the best amount of bias grows as data shrink: the
more a ViT-like network is like a convolution, the smaller the data at which it passes a ResNet, and on small
data layers should switch to attention linearly earlier the later they are. Here the CNN, the ViT and `prs`
with four schedules train on class-balanced shares of one data set, for as many epochs as make all see the
same number of images. The program draws accuracy against the share and prints where each passes the CNN,
linearly interpolated in the logarithm of the share. Networks, shares and epochs are ours; `early-first` and
`uniform` are controls that the abstract does not have.

    python examples/data_scale.py --quick
    python examples/data_scale.py --data cifar10 --images-seen 300000 --seeds 3
    python examples/data_scale.py --data cifar10 --images-seen 300000 --share 0.01 --share 0.1 --share 1

The second, full form is 90 trainings. Everything is kept in the output folder: a program that was stopped
goes on, one that is done only draws again, and more shares or seeds are added to what is there.
"""

from dataclasses import replace
from itertools import pairwise

import click
import numpy as np
from _runs import (
    Table,
    data_of,
    difference,
    experiment,
    mean_and_spread,
    outcome,
    over_updates,
    run_name,
    save,
    settings,
    trained,
)
from matplotlib.figure import Figure

from fourierbias.training import Recipe
from fourierbias.training.data import plan_epoch
from fourierbias.training.output import write_csv

# From the most to the least like a convolution, but for the three that switch midway, whose order is not
# known: architecture, schedule, colour and line.  `prs` that never switches is the CNN, to the bit.
MODELS = {
    "cnn": ("prs", "conv", "black", "o-"),
    "prs-early-first": ("prs", "early-first", "C2", "v--"),
    "prs-late-first": ("prs", "late-first", "C0", "^-"),
    "prs-uniform-half": ("prs", "uniform:50%", "C4", "D--"),
    "prs-attention": ("prs", "attention", "C1", "s-"),
    "vit": ("vit", None, "C3", "P-"),
}
SHARES = (0.01, 0.05, 0.1, 0.3, 1.0)
OWN = ("fraction", "schedule", "seed", "epochs", "warmup_epochs", "evaluate_every")  # no --change of these


@experiment
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Trainings of each kind.")
@click.option("--images-seen", type=click.IntRange(1), help="[default: 100000; quick: 960]")
@click.option("--share", "shares", type=float, multiple=True, help="Repeatable.  [default: 0.01, 0.05, …, 1]")
def main(data, output, runs, quick, seeds, change, images_seen, shares):
    """Accuracy of networks between a CNN and a ViT against the share of the training images."""
    # So few steps need small batches, and gates that open faster than at the common learning rate.
    options = settings({"batch_size": 16, "gate_lr": 10.0} if quick else {}, change, OWN)
    images_seen = images_seen or (960 if quick else 100_000)
    rows, kept = [], Table(output / "data_scale.csv")
    for share in sorted(shares or ((0.01, 0.03, 0.1) if quick else SHARES)):
        for model, (arch, schedule, *_) in MODELS.items():
            recipe = Recipe(**{**options, "fraction": share, "schedule": schedule})
            for seed in range(seeds):
                rows += accuracy_row(
                    model, arch, data, replace(recipe, seed=seed), images_seen, runs, kept, change
                )
    found = [row for model in MODELS if model != "cnn" for row in crossings(rows, model)]
    write_csv(
        output / "data_scale-crossings.csv",
        found or [dict.fromkeys(("model", "share", "from_there_on", "certain"))],
    )
    report(rows, found)
    save(draw(rows, found), output / "data_scale.png")


def accuracy_row(model, arch, data, recipe, images_seen, runs, kept, change=()):
    """Accuracy of a network after as many epochs as show it ``images_seen`` images, as one row."""
    count = len(data_of(data, recipe, listed=True).train)
    epochs, seen = epochs_for(count, recipe, images_seen)
    recipe = replace(recipe, **over_updates(epochs))

    def measured():
        about = {"model": model, "share": recipe.fraction, "train_images": count}
        about |= {"epochs": epochs, "images_seen": seen, "seed": recipe.seed}
        about |= {"changed": " ".join(change), "evaluated_on": evaluated_on(recipe)}
        return [about | outcome(trained(runs, arch, data, recipe))]

    return kept.of(run_name(arch, data, recipe), measured)


def evaluated_on(recipe):
    """Which images an accuracy is of."""
    return f"{recipe.holdout} held-out images" if recipe.holdout else "test images"


def epochs_for(count, recipe, images_seen):
    """The number of epochs that come nearest to ``images_seen`` images, and how many that are."""
    seen_in_epoch = sum(map(len, plan_epoch(count, recipe.batch_size, seed=0, epoch=0)))
    epochs = max(1, round(images_seen / seen_in_epoch))
    return epochs, epochs * seen_in_epoch


def accuracies(rows, model):
    """Shares (S,), and a model's accuracies at each, (S, seeds)."""
    shares = sorted({row["share"] for row in rows})
    return np.array(shares), np.array(
        [[r["accuracy"] for r in rows if (r["model"], r["share"]) == (model, share)] for share in shares]
    )


def crossings(rows, model):
    """Shares at which a model passes the CNN or falls below it, by lines over the logarithm of the share.

    A crossing is ``certain`` where the differences on both of its sides are, at p < 0.05.
    """
    shares, values = accuracies(rows, model)
    found = [difference(*pair) for pair in zip(values, accuracies(rows, "cnn")[1], strict=True)]
    for (before, after), (left, right) in zip(pairwise(found), pairwise(np.log(shares)), strict=True):
        if (before[0] < 0) != (after[0] < 0):
            share = np.exp(left + (right - left) * before[0] / (before[0] - after[0]))
            direction = "below" if after[0] < 0 else "above"
            certain = bool(before[2] < 0.05 and after[2] < 0.05)  # never with one seed, whose p is nan
            yield {"model": model, "share": float(share), "from_there_on": direction, "certain": certain}


def report(rows, found):
    """Print the table of accuracies, and where each model crosses the CNN."""
    shares, cnn = accuracies(rows, "cnn")
    print(f"{'accuracy (%) at':<17}" + "".join(f"{share:>13.3g}" for share in shares))
    for model in MODELS:
        cells = zip(*mean_and_spread(100 * accuracies(rows, model)[1]), strict=True)
        print(
            f"{model:<17}"
            + "".join(f"{mean:6.1f} ± {std:4.1f}" for mean, std in cells).replace("±  nan", " " * 6)
        )
    for model in list(MODELS)[1:]:
        own = [
            f"{row['from_there_on']} it from a share of {row['share']:.2g} on"
            + ("" if row["certain"] else " (uncertain)")
            for row in found
            if row["model"] == model
        ]
        below = (accuracies(rows, model)[1] - cnn).mean(axis=1) < 0
        never = "below it at every share" if below.all() else "not below it at any share"
        print(f"{model} against the CNN: {', '.join(own) or never}")


def draw(rows, found):
    """Accuracy against the share, and of `prs` its difference to the CNN's with the crossings ringed."""
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2)
    shares, cnn = accuracies(rows, "cnn")
    for model, (*_, color, line) in MODELS.items():
        values = accuracies(rows, model)[1]
        for ax, shown in ((left, values), (right, values - cnn)):
            mean, std = mean_and_spread(100 * shown)
            ax.errorbar(shares, mean, std, fmt=line, color=color, markersize=4, capsize=2, label=model)
        for row in (row for row in found if row["model"] == model):
            right.plot(row["share"], 0, "o", fillstyle="none", markersize=9, color=color)
    left.set_ylabel(f"accuracy (%) on {rows[0]['evaluated_on']}")
    right.set_ylabel("accuracy minus the CNN's (points), where prs lies")
    # The ViT is so far off that beside it nothing could be told of these.
    own = [100 * (accuracies(rows, model)[1] - cnn) for model in MODELS if MODELS[model][0] == "prs"]
    right.set_ylim(np.min(own) - 0.5, np.max(own) + 0.5)
    for ax in (left, right):
        ax.set(xscale="log", xlabel="share of the training images")
        ax.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
        ax.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    seen, seeds = sorted(row["images_seen"] for row in rows), cnn.shape[1]
    bars = f"bars: standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    figure.supxlabel(
        f"images seen by each training: {seen[0]} to {seen[-1]}; rings: crossings; {bars}", fontsize=8
    )
    return figure


if __name__ == "__main__":
    main()
