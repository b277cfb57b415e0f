"""Which settings of the recipe to take: trainings compared on images held out of those trained on.

Every `--try` is one set of settings of the recipe, for every `--model`; the accuracy is that on `--holdout`
training images, never the test set's. For `prs` the table also has how far its gates have opened: the mean
over layers and heads of |share of content attention|, 0 for a convolution.

    python examples/choices.py --quick
    python examples/choices.py --data cifar10 --model cnn --model vit --try lr=0.001 --try lr=0.003
    python examples/choices.py --data cifar10 --model prs --share 0.1 --images-seen 200000 --holdout 1000 \\
        --try schedule=conv --try schedule=late-first --try schedule=late-first,gate_lr=10

Rows are added to those in choices.csv of the output folder; what is there is not trained again.
"""

import click
import numpy as np
from _runs import Table, data_of, experiment, outcome, over_updates, run_name, save, settings, trained
from data_scale import epochs_for
from matplotlib.figure import Figure

from fourierbias.models.loading import load_model
from fourierbias.models.reparam import reparam_layers
from fourierbias.training import Recipe


@experiment
@click.option("--model", "models", multiple=True, help="Repeatable.  [default: cnn, vit; quick: cnn]")
@click.option(
    "--try", "tries", multiple=True, metavar="NAME=VALUE,…", help="Repeatable.  [default: lr=0.001, lr=0.003]"
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Trainings of each kind.")
@click.option("--images-seen", type=click.IntRange(1), help="[default: 100000; quick: 960]")
@click.option("--share", type=float, default=1.0, show_default=True, help="Of the training images.")
@click.option("--holdout", type=click.IntRange(1), help="Images held out.  [default: 5000; quick: 16]")
def main(data, output, runs, quick, models, tries, seeds, change, images_seen, share, holdout):
    """Accuracy on held-out images with one set of settings or another."""
    common = {"batch_size": 16} if quick else {}
    fixed = {"fraction": share, "holdout": holdout or (16 if quick else 5000)}
    kept, rows = Table(output / "choices.csv"), []
    plain = Recipe(**settings(common, change, **fixed))
    count = len(data_of(data, plain, listed=True).train)
    epochs, seen = epochs_for(count, plain, images_seen or (960 if quick else 100_000))
    about = {"share": share, "train_images": count, "epochs": epochs, "images_seen": seen}
    for model in models or (("cnn",) if quick else ("cnn", "vit")):
        for text in tries or ("lr=0.001", "lr=0.003"):
            for seed in range(seeds):
                options = {**common, **over_updates(epochs)}
                options = settings(options, (*change, *text.split(",")), **fixed, seed=seed)
                rows += choice_row(
                    {"model": model, "settings": text, **about}, data, Recipe(**options), runs, kept
                )
    report(rows)
    save(draw(rows), output / "choices.png")


def choice_row(about, data, recipe, runs, kept):
    """Accuracy on held-out images of one training, as one row."""

    def measured():
        path = trained(runs, about["model"], data, recipe)
        held = {"seed": recipe.seed, "holdout": recipe.holdout, **outcome(path)}
        return [{**about, **held, "mean_content_share": openness(path)}]

    return kept.of(run_name(about["model"], data, recipe), measured)


def openness(path):
    """Mean |share of content attention| over the heads of all layers that can attend; None without such."""
    layers = reparam_layers(load_model(path).module).values()
    return float(np.mean([layer.shares()[1].detach().abs().mean() for layer in layers])) if layers else None


def report(rows):
    """Print the table, the best of each model first."""
    for model in dict.fromkeys(row["model"] for row in rows):
        means = {}
        for text in dict.fromkeys(row["settings"] for row in rows if row["model"] == model):
            chosen = [row for row in rows if (row["model"], row["settings"]) == (model, text)]
            opened = [row["mean_content_share"] for row in chosen if row["mean_content_share"] is not None]
            means[text] = 100 * np.mean([row["accuracy"] for row in chosen]), opened
        for text, (accuracy, opened) in sorted(means.items(), key=lambda item: -item[1][0]):
            gates = f"  mean |content share| {np.mean(opened):.2f}" if opened else ""
            print(f"{model:<6} {accuracy:6.2f} %  {text}{gates}")
    held = rows[0]["holdout"]
    print(f"One standard error of an accuracy near 70 % on {held} images: {100 * (0.21 / held) ** 0.5:.1f}.")


def draw(rows):
    """A bar for every model and set of settings, with the standard error over the held-out images."""
    names = list(dict.fromkeys((row["model"], row["settings"]) for row in rows))
    figure = Figure(figsize=(7, 0.3 * len(names) + 1.2))
    ax = figure.subplots()
    models = list(dict.fromkeys(model for model, _ in names))
    for place, name in enumerate(names):
        values = np.array([row["accuracy"] for row in rows if (row["model"], row["settings"]) == name])
        # However many seeds: all are evaluated on the same images.
        error = np.sqrt(values.mean() * (1 - values.mean()) / rows[0]["holdout"])
        ax.barh(place, 100 * values.mean(), xerr=100 * error, color=f"C{models.index(name[0])}", alpha=0.7)
    ax.set_yticks(range(len(names)), [f"{model}: {text}" for model, text in names])
    ax.invert_yaxis()
    ax.set_xlabel(
        f"accuracy (%) on {rows[0]['holdout']} held-out images, after {rows[0]['images_seen']} seen"
    )
    return figure


if __name__ == "__main__":
    main()
