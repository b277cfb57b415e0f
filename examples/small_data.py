"""On little data, is a network that leaves the convolution layer by layer better than what lies at its ends?

PRS (Lee et al., arXiv 2210.01370, abstract) has it that on small data layers should switch from convolution
to attention linearly earlier the later they are, and that this is better than earlier methods. Here `prs`
trains with five schedules on a class-balanced tenth of one data set, beside the ViT and, if asked for, EIT,
LSRA and a bootstrapped ViT, all with one recipe and budget. That late-first should also pass the uniform
switch and its own mirror, early-first, is our control, not the paper's claim; no number of the paper is
known to us. Below the accuracies it draws how far the layers have left the convolution at the end.

    python examples/small_data.py --quick
    python examples/small_data.py --data cifar10 --seeds 3 --others 1
    python examples/small_data.py --data cifar10 --change holdout=1000 --change gate_lr=10

The second, full form is 21 trainings of 300,000 images each; the third is how settings are chosen, on images
held out of those trained on. Everything is kept in the output folder: a program that was stopped goes on,
one that is done only draws again, and more seeds are added to what is there.
"""

import csv

import click
import numpy as np
from _runs import Table, difference, experiment, mean_and_spread, save, settings
from data_scale import MODELS, OWN, accuracy_row
from matplotlib.figure import Figure

from fourierbias.training import Recipe
from fourierbias.training.output import write_csv

OTHERS = {
    "eit": ("eit", None, "C5", "o"),
    "lsra": ("lsra", None, "C6", "o"),
    "vit-bootstrapped": ("vit-bootstrapped", None, "C8", "o"),
}
ALL = {**MODELS, **OTHERS}
PROPOSED, CONTROLS = "prs-late-first", ("cnn", "prs-attention", "prs-uniform-half", "prs-early-first")


@experiment
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Trainings of each kind.")
@click.option("--others", type=click.IntRange(0), default=0, show_default=True, help="Of EIT, LSRA, … each.")
@click.option("--images-seen", type=click.IntRange(1), help="[default: 300000; quick: 960]")
@click.option("--share", type=float, default=0.1, show_default=True, help="Of the training images.")
def main(data, output, runs, quick, seeds, change, others, images_seen, share):
    """Accuracy of prs with five schedules, and of transformers, on a share of the training images."""
    # So few steps need small batches, and gates that open faster than at the common learning rate.
    options = settings({"batch_size": 16, "gate_lr": 10.0} if quick else {}, change, OWN, fraction=share)
    images_seen = images_seen or (960 if quick else 300_000)
    kept, rows = Table(output / "small_data.csv"), []
    kept_shares, shares = Table(output / "small_data-shares.csv"), []
    # Seed by seed, so that whatever is there when this is stopped can be compared.
    for seed in range(max(seeds, others)):
        for model, (arch, schedule, *_) in ALL.items():
            if seed < (others if model in OTHERS else seeds):
                recipe = Recipe(**{**options, "schedule": schedule, "seed": seed})
                (row,) = accuracy_row(model, arch, data, recipe, images_seen, runs, kept, change)
                rows.append(row)
                if arch == "prs":
                    shares += kept_shares.of(row["run"], lambda row=row: content_shares(row, runs))
    accuracies = {name: [row["accuracy"] for row in rows if row["model"] == name] for name in ALL}
    accuracies = {name: 100 * np.array(values) for name, values in accuracies.items() if values}
    means = [averaged(model, values) for model, values in accuracies.items()]
    found = [compared(accuracies, control) for control in CONTROLS]
    for name, made in (("means", means), ("differences", found)):
        write_csv(output / f"small_data-{name}.csv", made)
    report(means, found)
    save(draw(accuracies, shares, rows[0]), output / "small_data.png")


def content_shares(row, runs):
    """The share of content attention of every layer after a training, from its log: 0 for a convolution."""
    log = runs / f"{row['run']}.layers.csv"
    if log.exists():  # the table of accuracies may be all that is left of a training
        with open(log) as file:
            last = [line for line in csv.DictReader(file) if line["epoch"] == str(row["epochs"])]
        for line in last:
            share = float(line["content_share"])
            yield {"model": row["model"], "seed": row["seed"], "layer": line["layer"], "content_share": share}


def averaged(model, values):
    """Mean accuracy of a kind over seeds and their standard deviation, in percent."""
    mean, std = mean_and_spread(values)
    return {"model": model, "seeds": len(values), "mean": mean, "standard_deviation": std}


def compared(accuracies, control):
    """By how many points late-first passes or misses a control: Welch's test over seeds, and what it says."""
    gain, error, p = difference(accuracies[PROPOSED], accuracies[control])
    numbers = {"difference": gain, "standard_error": error, "p_value": p}
    return {"model": PROPOSED, "minus": control, **numbers, "verdict": verdict(gain, p)}


def report(means, found):
    """Print the table of accuracies, and late-first against each of its controls."""
    for row in means:
        seeds, std = row["seeds"], row["standard_deviation"]
        spread = f" ± {std:4.2f}" if seeds > 1 else "       "
        print(f"{row['model']:<17} {row['mean']:6.2f}{spread} %  ({seeds} seed{'s'[: seeds > 1]})")
    for row in found:
        error, p = row["standard_error"], row["p_value"]
        known = f" ± {error:.2f} points, p = {p:.2g}" if np.isfinite(error) else " points"
        print(f"{row['model']} minus {row['minus']}: {row['difference']:+.2f}{known}: {row['verdict']}")


def verdict(gain, p):
    """What a difference and its p say; 0.05 is asked for."""
    if not p < 0.05:
        return "not decidable with these seeds"
    return "better" if gain > 0 else "worse"


def draw(accuracies, shares, about):
    """A dot for each training and the mean of each kind, all and those of `prs`; content shares by layer."""
    figure = Figure(figsize=(9, 0.4 * len(accuracies) + 4))
    above, below = figure.subfigures(2, 1, height_ratios=[0.4 * len(accuracies) + 1, 3])
    axes = above.subplots(1, 2, sharey=True, width_ratios=[1, 1.4])
    own = np.concatenate([values for model, values in accuracies.items() if ALL[model][0] == "prs"])
    for ax in axes:
        for place, (model, values) in enumerate(accuracies.items()):
            style = {"color": ALL[model][2]}
            ax.plot(values, np.full(len(values), place), "o", markersize=5, alpha=0.6, **style)
            ax.plot(values.mean(), place, "|", markersize=16, markeredgewidth=2, **style)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
    axes[0].set_yticks(range(len(accuracies)), accuracies)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("accuracy (%), all")
    axes[1].set_xlim(own.min() - 0.3, own.max() + 0.3)
    axes[1].set_xlabel("accuracy (%), where the networks of prs lie")
    draw_shares(below.subplots(), shares)
    figure.supxlabel(
        f"on {about['evaluated_on']} after {about['epochs']} epochs of {about['train_images']} images; "
        "dots: one training each; bars and lines: means",
        fontsize=8,
    )
    return figure


def draw_shares(ax, shares):
    """The share of content attention of every layer after training: a dot for each, a line for the means."""
    layers = list(dict.fromkeys(row["layer"] for row in shares))
    for model in dict.fromkeys(row["model"] for row in shares):
        *_, color, line = MODELS[model]
        values = [
            [r["content_share"] for r in shares if (r["model"], r["layer"]) == (model, layer)]
            for layer in layers
        ]
        places = np.repeat(range(len(layers)), [len(of_layer) for of_layer in values])
        ax.plot(places, np.concatenate(values), "o", markersize=3, alpha=0.4, color=color)
        ax.plot([np.mean(of_layer) for of_layer in values], line[1:], color=color, label=model)
    ax.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    ax.set(ylim=(-0.03, 1.03), ylabel="content share at the end\n(0: convolution)")
    if shares:  # else the trainings are gone, and their accuracies alone were kept
        ax.legend()


if __name__ == "__main__":
    main()
