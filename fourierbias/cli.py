"""The command line: parse, call, print.  Heavy imports are inside the commands, so that help is instant."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import click

from ._malloc import keep_memory
from ._version import __version__
from .distributed import is_first, local_device, session, usable_device
from .errors import FourierBiasError

_PATHS = ("diagonal", "horizontal", "vertical", "radial", "2d")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends in one line ``Error: …`` on stderr and exit status 2.

    Of several processes that a launcher started together, one says it.
    """
    keep_memory()
    warnings.showwarning = _show_warning
    try:
        with session():
            status = cli.main(arguments, prog_name="fourierbias", standalone_mode=False)
    except (click.ClickException, FourierBiasError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _fail(message)
    except (click.Abort, KeyboardInterrupt) as stopped:
        if is_first():
            click.echo(str(stopped.__cause__ or "") or "Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:  # `fourierbias info … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except MemoryError:
        _fail("out of memory: use a smaller --batch-size")
    sys.exit(status or 0)


def _fail(message: str) -> None:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    if issubclass(category, UserWarning) and is_first():
        click.echo(f"Warning: {message}", err=True)


def _options(*options: Any) -> Any:
    """Several click options as one decorator, in the order they are to be listed."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_model_options = _options(
    click.option("--arch", help="Architecture of a weights file: a timm name, or package.module:factory."),
    click.option("--pretrained", is_flag=True, help="timm's pretrained weights (needs a network)."),
    click.option("--image-size", type=int, help="Input side in pixels, where the model takes others."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and crops."),
    click.option("--no-ema", is_flag=True, help="Prefer the raw weights where a file has averaged ones too."),
    click.option("--unsafe-pickle", is_flag=True, help="Unpickle code from a file you trust entirely."),
)

_layers_option = click.option(
    "--layers",
    multiple=True,
    metavar="WHICH",
    help="blocks (default), sublayers, stages, or glob patterns on module names; repeatable.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Does a vision model pass or suppress high spatial frequencies, layer by layer?

    \b
    fourierbias capture vit_tiny_patch16_224     feature maps to spectra, into an HDF5 file
    fourierbias plot vit_tiny_patch16_224.h5     a figure of them
    fourierbias plot --compare a.h5 b.ckpt       several models beside each other
    fourierbias train cnn --data photos          make a checkpoint
    """


@cli.command()
@click.argument("model")
@_model_options
@click.option(
    "--data", default="photos", show_default=True, help="Folder, image, list, archive, array or data set."
)
@click.option("--images", type=int, help="How many images (default: all; of the photos 16).")
@_layers_option
@click.option(
    "--path", "paths", multiple=True, type=click.Choice(_PATHS), help="Default: diagonal; repeatable."
)
@click.option(
    "--measure", "measures", multiple=True, help="Measures beside the spectrum, or all; repeatable."
)
@click.option("--features", is_flag=True, help="Store the feature maps too.")
@click.option(
    "--feature-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True
)
@click.option("--compression", type=click.Choice(["gzip", "lzf", "none"]), default="gzip", show_default=True)
@click.option("--dead-channels", type=click.Choice(["keep", "drop"]), default="keep", show_default=True)
@click.option("--eps", type=float, default=1e-6, show_default=True, help="Added to |F| before the logarithm.")
@click.option(
    "--calls",
    type=click.Choice(["last", "each"]),
    default="last",
    show_default=True,
    help="Of a module called several times in one forward.",
)
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--workers", type=int, default=0, show_default=True, help="Processes that decode images.")
@click.option("--device", help="cpu, cuda, … (default: a GPU if there is one).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="HDF5 file (default: MODEL.h5 here).")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--resume", is_flag=True, help="Go on with a capture that was interrupted; starts one if none was."
)
@click.option("--save-every", type=float, default=60.0, show_default=True, help="Seconds between saves.")
@click.option("--shard", metavar="K/N", help="Only the K-th of N parts of the images, 1/N to N/N; see merge.")
@click.option("--consolidate", is_flag=True, help="Of torchrun: copy the ranks' feature maps into one file.")
def capture(
    model: str,
    output: Path | None,
    layers: tuple[str, ...],
    images: int | None,
    shard: str | None,
    **options: Any,
) -> None:
    """Spectra of MODEL's feature maps, layer by layer, into an HDF5 file.

    MODEL is a checkpoint (.ckpt), a timm model name (random weights unless --pretrained), or a weights
    file with --arch.  Under torchrun the ranks share the images.
    """
    from .capturing import capture as run
    from .models.loading import WEIGHT_SUFFIXES

    loaded = _load(model, options)
    output = output or _beside(model, ".h5", but=WEIGHT_SUFFIXES)
    before = output.stat() if output.exists() else None
    result = run(
        loaded,
        options.pop("data"),
        layers=_layers(layers),
        output=output,
        limit=images,
        paths=options.pop("paths") or ("diagonal",),
        shard=_shard(shard),
        progress=True,
        **options,
    )
    if is_first():
        _print_capture(result)
        if output.stat() == before:
            click.echo(f"{output} was complete already.")
        else:
            _print_written(result, output)
        click.echo("Next: fourierbias " + ("merge PARTS -o ALL.h5" if shard else f"plot {output}"))


@cli.command()
@click.argument("parts", nargs=-1, required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="HDF5 file for the whole."
)
@click.option("--consolidate", is_flag=True, help="Copy feature maps, in place of references to PARTS.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
def merge(parts: tuple[str, ...], output: Path, consolidate: bool, overwrite: bool) -> None:
    """Put PARTS, all that capture --shard made of one capture, together as one file."""
    from .capturing import merge as run

    result = run(parts, output, overwrite=overwrite, consolidate=consolidate)
    _print_capture(result)
    _print_written(result, output)
    click.echo(f"Next: fourierbias plot {output}")


def _beside(model: str, suffix: str, but: tuple[str, ...]) -> Path:
    """A file here, named for a model: without its suffix if that is one of ``but``; a timm tag stays."""
    name = Path(model.rstrip("/")).name
    return Path((Path(name).stem if Path(name).suffix.lower() in but else name) + suffix)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise FourierBiasError(f"--shard {text}: write it as 3/16, the third of sixteen parts")
    return int(number), int(count)


def _print_written(result: Any, output: Path) -> None:
    click.echo(f"Wrote {output}: {len(result)} layers, {result.attrs['count']} images.")


@cli.command()
@click.argument("model")
@_model_options
@_layers_option
def info(model: str, layers: tuple[str, ...], **options: Any) -> None:
    """List the layers of MODEL that each --layers choice takes, with kind and shape."""
    from .capturing import inspect
    from .probes import CHOICES

    loaded = _load(model, options)
    _print_gates(loaded)
    for choice in [_layers(layers)] if layers else CHOICES:
        found, skipped = inspect(loaded, choice)
        click.echo(f"\n{choice if isinstance(choice, str) else ' '.join(choice)}: {len(found)} layers")
        width = max((len(layer.name) for layer in found), default=0)
        for layer in found:
            shape = f"{layer.channels}×{layer.height}×{layer.width}"
            click.echo(f"  {layer.name:<{width}}  {layer.kind:<9}  {shape:>12}  stride {layer.stride:g}")
        for name, reason in skipped.items():
            click.echo(f"  {name:<{width}}  skipped: {reason}")


def _print_gates(loaded: Any) -> None:
    """What the reparameterizable convolutions of a model are by now, on the photographs."""
    from .images import open_images
    from .models.reparam import attention_statistics, reparam_layers

    layers = reparam_layers(loaded.module)
    if not layers:
        return
    images = next(iter(open_images("photos", loaded.preprocessing, batch_size=16))).images
    found = attention_statistics(loaded.module, images)
    width = max(map(len, layers))
    click.echo("reparameterizable convolutions (means over heads; distance in patches of the layer's input):")
    for name, layer in layers.items():
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in found.get(name, {}).items())
        click.echo(f"  {name:<{width}}  {'attention' if layer.is_attention else 'conv':<9}  {numbers}")


@cli.command()
@click.argument("files", nargs=-1)
@click.option("--compare", is_flag=True, help="Models side by side; without FILES those that ship.")
@click.option(
    "--at", type=float, help="Frequency in units of π (default 1); of a measure the cut-off (default 0.5)."
)
@click.option(
    "--axis",
    type=click.Choice(["normalized", "input"]),
    default="normalized",
    show_default=True,
    help="0…π of each grid, or cycles per input pixel.",
)
@click.option("--reference", type=click.Choice(["dc", "first"]), default="dc", show_default=True)
@click.option("--compat", type=click.Choice(["park-kim"]), help="The published notebook's values and axis.")
@click.option("--path", type=click.Choice(_PATHS), help="Which of the captured lines (default: the first).")
@click.option("--measure", help="Plot this measure by depth instead.")
@click.option(
    "--layers", multiple=True, metavar="WHICH", help="Of checkpoints captured on the fly; as in capture."
)
@click.option(
    "--data", default="photos", show_default=True, help="Images for checkpoints captured on the fly."
)
@click.option("--images", type=int, help="How many of them.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help=".png, .svg or .pdf (default: FILE.png here)."
)
@click.option("--csv", type=click.Path(path_type=Path), help="Also write the numbers plotted.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
def plot(
    files: tuple[str, ...],
    output: Path | None,
    csv: Path | None,
    overwrite: bool,
    layers: tuple[str, ...],
    data: str,
    images: int | None,
    compare: bool,
    **options: Any,
) -> None:
    """Draw captures: Δ log amplitude against frequency, and its high end against depth.

    FILES are captures (.h5) or checkpoints, which are captured on the fly and cached; or one file of spectra
    through training, from train --probe.
    """
    from .captured import is_hdf5, open_captures, shipped_checkpoints
    from .figures import in_words, plot_training
    from .figures import plot as draw
    from .store import checked_output, is_series, load_series

    if not files:
        if not compare:
            raise FourierBiasError(
                "name a capture to plot, or use --compare alone for the checkpoints that ship"
            )
        files = tuple(str(path) for path in shipped_checkpoints())
    output = output or Path("compare.png" if compare or len(files) > 1 else Path(files[0]).stem + ".png")
    for path in filter(None, (output, csv)):
        if path.resolve() in {Path(file).resolve() for file in files}:
            raise FourierBiasError(f"{path} is what is to be plotted: choose another output")
        checked_output(path, overwrite=overwrite)
    if len(files) == 1 and is_hdf5(files[0]) and is_series(files[0]):
        plot_training(load_series(files[0]), output=output, csv=csv, **options)
        click.echo(_written(output, csv))
        return
    captures = open_captures(
        files, layers=_layers(layers), data=data, images=images, measure=options["measure"], say=_say
    )
    draw(captures, compare=compare or len(captures) > 1, output=output, csv=csv, **options)
    if compare and options["measure"] is None and options["path"] != "2d":
        click.echo(in_words(captures, **{k: options[k] for k in ("at", "reference", "compat", "path")}))
    click.echo(_written(output, csv))


def _written(*paths: Path | None) -> str:
    return f"Wrote {' and '.join(str(path) for path in paths if path)}."


@cli.command()
@click.argument("model")
@click.option(
    "--data", default="photos", show_default=True, help="photos, cifar10, cifar100, or an image folder."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Checkpoint (default: MODEL.ckpt here)."
)
@click.option("--epochs", type=int, help="Passes over the training images.  [default: 30]")
@click.option("--batch-size", type=int, help="[default: 128]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 0.015]")
@click.option("--weight-decay", type=float, help="[default: 0.05]")
@click.option("--warmup-epochs", type=float, help="[default: 1]")
@click.option("--smoothing", type=float, help="Label smoothing.  [default: 0.1]")
@click.option("--mixup", type=float, help="α of mixup.  [default: 0, none]")
@click.option("--cutmix", type=float, help="α of cutmix.  [default: 0, none]")
@click.option("--drop-path", type=float, help="Stochastic depth.  [default: 0]")
@click.option(
    "--ema", type=float, help="Decay of the weight average that is evaluated and saved.  [default: 0.999]"
)
@click.option("--opt", help="Any optimiser of timm.  [default: nmuon]")
@click.option("--amp", type=click.Choice(["auto", "bfloat16", "float32"]), help="[default: auto]")
@click.option("--fraction", type=float, help="Class-balanced share of the training images.  [default: 1]")
@click.option(
    "--holdout", type=int, help="Evaluate on so many training images held out, not on the test set."
)
@click.option("--image-size", type=int, help="Input side in pixels (default: the model's own).")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--schedule", help="Of `prs`: conv, attention, uniform:E, late-first, early-first.")
@click.option("--schedule-by", type=click.Choice(["layer", "stage"]), help="[default: layer]")
@click.option(
    "--gate", type=click.Choice(["linear", "sigmoid"]), help="Of attention at a switch.  [default: linear]"
)
@click.option("--gate-lr", type=float, help="Factor on the learning rate of gates.  [default: 1]")
@click.option("--locality", type=float, help="Strength α of positional attention (default: exact).")
@click.option(
    "--recast",
    multiple=True,
    metavar="PATTERN",
    help="Start with these convolutions as attention; with --schedule, those that switch.",
)
@click.option(
    "--mode",
    type=click.Choice(["joint", "shared"]),
    help="Of bootstrap: two networks that teach each other, or that share weights.  [default: joint]",
)
@click.option("--agent", help="Of bootstrap: agent or agent_res.  [default: agent]")
@click.option(
    "--alignment",
    type=click.Choice(["2d", "1d"]),
    help="Of bootstrap's hint: pooled on the grid, or along tokens as published code does.  [default: 2d]",
)
@click.option("--hint-weight", type=float, help="Of bootstrap's feature hint.  [default: 10]")
@click.option("--probe", type=int, metavar="EPOCHS", help="Capture spectra so often, into MODEL.probe.h5.")
@click.option("--half", is_flag=True, help="Store the checkpoint's weights in half precision.")
@click.option("--save-every", type=float, help="Seconds between saved states.  [default: 300]")
@click.option("--evaluate-every", type=int, help="Epochs between evaluations.  [default: 1]")
@click.option("--device", help="cpu, cuda, … (default: a GPU if there is one).")
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: all cores).")
@click.option(
    "--resume", is_flag=True, help="Go on with a training that was interrupted; starts one if none was."
)
@click.option("--overwrite", is_flag=True, help="Start anew, replacing the output.")
def train(
    model: str,
    data: str,
    output: Path | None,
    recast: tuple[str, ...],
    mode: str | None,
    agent: str | None,
    alignment: str | None,
    hint_weight: float | None,
    probe: int | None,
    half: bool,
    device: str | None,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    **settings: Any,
) -> None:
    """Train MODEL, a reference network (cnn, vit, prs, eit, lsra, agent) or any timm name, from scratch.

    MODEL may be bootstrap: the reference ViT with an agent CNN.  Writes MODEL.ckpt (the last epoch),
    MODEL.best.ckpt and the log MODEL.csv.
    """
    import torch

    from .training.bootstrap import bootstrap
    from .training.output import Files, output_path
    from .training.probe import SpectrumProbe
    from .training.recipe import Recipe
    from .training.trainer import TrainingInterruptedError
    from .training.trainer import train as run

    if threads is not None:
        torch.set_num_threads(threads)
    recipe = Recipe(**{name: value for name, value in settings.items() if value is not None})
    learner = None
    teaching = {"mode": mode, "agent": agent, "alignment": alignment, "hint_weight": hint_weight}
    teaching = {name: value for name, value in teaching.items() if value is not None}
    if model == "bootstrap":
        model, learner = "vit", bootstrap(**teaching)
        output = output or Path("vit-bootstrapped.ckpt")
    elif teaching:
        raise FourierBiasError(
            f"--{min(teaching).replace('_', '-')} is for training bootstrap, not {model}: leave it out"
        )
    hooks = []
    if probe is not None:
        series = Files(output_path(model, output)).series
        hooks.append(SpectrumProbe(series, probe, recipe.epochs, image_size=recipe.image_size))
    try:
        result = run(
            model,
            data,
            output,
            recipe,
            learner=learner,
            on_epoch_end=hooks,
            half=half,
            recast={"layers": list(recast)} if recast else None,
            device=device,
            resume=resume,
            overwrite=overwrite,
        )
    except TrainingInterruptedError as stopped:
        _say(str(stopped))
        sys.exit(130)
    if not is_first():
        return
    click.echo(f"Wrote {result.path}: test accuracy {100 * result.metrics['test_accuracy']:.2f} %.")
    if probe is not None:
        click.echo(f"Wrote {series}: spectra through training.  Next: fourierbias plot {series}")
    click.echo(f"Next: fourierbias plot {result.path}")


@cli.command()
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--data", required=True, help="photos, cifar10, cifar100, or an image folder.")
@click.option("--device", help="cpu, cuda, … (default: a GPU if there is one).")
@click.option("--csv", type=click.Path(path_type=Path), help="Also write the accuracies as a table.")
@click.option("--overwrite", is_flag=True, help="Replace a table that exists.")
def evaluate(
    checkpoints: tuple[str, ...], data: str, device: str | None, csv: Path | None, overwrite: bool
) -> None:
    """Recompute the test accuracy of CHECKPOINTS, and show what they recorded of it."""
    from .models.checkpoint import build, read_checkpoint
    from .store import checked_output
    from .training.data import load_data
    from .training.learner import evaluate as measure
    from .training.output import write_csv

    if csv is not None:
        checked_output(csv, overwrite=overwrite)
    rows = []
    device = usable_device(device) if device else local_device()
    loaded: dict[str, Any] = {}
    for path in checkpoints:
        checkpoint = read_checkpoint(path)
        key = repr(checkpoint.preprocessing)
        if key not in loaded:
            loaded[key] = load_data(data, checkpoint.preprocessing, say=_say)
        network = build(checkpoint).to(device)
        accuracy = measure(network, loaded[key].evaluation_for(checkpoint.classes), device)["accuracy"]
        recorded = checkpoint.metrics.get("test_accuracy")
        noted = "" if recorded is None else f"  recorded {100 * recorded:6.2f} %"
        click.echo(f"{path}  accuracy {100 * accuracy:6.2f} %{noted}")
        about = {"model": Path(path).stem, "epochs": checkpoint.epoch}
        about["parameters"] = sum(parameter.numel() for parameter in network.parameters())
        rows.append({**about, "accuracy": accuracy, "recorded": recorded})
    if csv is not None:
        write_csv(csv, rows)
        click.echo(_written(csv))


def _layers(layers: tuple[str, ...]) -> str | list[str]:
    if not layers:
        return "blocks"
    return layers[0] if len(layers) == 1 else list(layers)


def _load(model: str, options: dict[str, Any]) -> Any:
    """The model that the shared options describe; takes them out of ``options`` (all but the seed)."""
    from .models.loading import load_model

    loaded = load_model(
        model,
        arch=options.pop("arch"),
        pretrained=options.pop("pretrained"),
        image_size=options.pop("image_size"),
        ema=not options.pop("no_ema"),
        unsafe_pickle=options.pop("unsafe_pickle"),
        seed=options["seed"],
    )
    _say(f"{loaded.arch}: {loaded.weights}")
    for note in loaded.notes:
        _say(note)
    return loaded


def _print_capture(result: Any) -> None:
    attrs = result.attrs
    for name, reason in attrs.get("skipped", {}).items():  # of a part without a readable image, not there
        _say(f"skipped {name}: {reason}")
    for name, reason in {**attrs.get("skipped_measures", {}), **attrs.get("skipped_attention", {})}.items():
        _say(f"no measure of {name}: {reason}")
    for name, calls in attrs.get("repeated_calls", {}).items():
        _say(f"{name} was called {calls} times in each forward (see --calls)")
    if attrs["failed_images"]:
        _say(f"{attrs['failed_images']} images could not be read:")
        for failure in attrs["failures"]:
            _say(f"  {failure}")


def _say(text: str) -> None:
    if is_first():
        click.echo(text, err=True)
