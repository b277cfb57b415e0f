"""The trainer: one loop, read from top to bottom; `train` at the end is the whole of it.

The weights that are evaluated and saved are an exponential average of those being trained. A training can be
stopped at any moment, killed too, and goes on to the same bits on a CPU: see `data` for how.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from timm.data import Mixup, resolve_data_config, resolve_model_data_config
from timm.models import get_pretrained_cfg, is_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ..errors import FourierBiasError
from ..models.checkpoint import (
    Checkpoint,
    check_arch,
    create,
    load_torch,
    read_checkpoint,
    save_checkpoint,
    save_torch,
)
from .data import Data, evaluation_batches, load_data, plan_epoch, step_seed, training_batches
from .learner import Classifier, Learner, LearnerEma, autocast, evaluate, fit_machine, logits_of
from .output import (
    Files,
    check_output,
    epoch_line,
    output_path,
    progress_bar,
    say,
    stop_signals,
    write_csv,
)
from .recipe import Recipe

MAY_DIFFER = {"save_every"}  # settings that a resumed training may change: they leave the result as it is


class TrainingInterruptedError(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved its state; the message says how to go on."""


@dataclass
class Result:
    """What a training ends with: the checkpoint's path, the last epoch's log row, and all rows."""

    path: Path
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """All that changes while training, with the steps of the loop as methods.

    ``epoch`` and ``step`` say what comes next; ``history`` holds the log's rows of finished epochs.
    """

    def __init__(self, learner: Learner, data: Data, recipe: Recipe, device: torch.device) -> None:
        self.learner, self.data, self.recipe, self.device = learner.to(device), data, recipe, device
        self.dtype = recipe.autocast_dtype(device)
        self.epoch = self.step = 0
        self.history: list[dict[str, Any]] = []
        self.layer_history: list[dict[str, Any]] = []
        self.switched: list[list[str]] = []
        self.switch_log: dict[str, Any] = {}
        self.sums: dict[str, Tensor] = {}
        self.seconds = 0.0
        self.best = -1.0
        self.steps_per_epoch = len(plan_epoch(len(data.train), recipe.batch_size, recipe.seed, 0))
        fit_machine(learner, device, self.dtype)
        options = {"fused": True} if recipe.opt == "adamw" else {}
        self.optimizer = create_optimizer_v2(
            learner, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **options
        )
        self.scheduler = self.new_scheduler()
        self.ema = self.new_ema()
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        # Smoothing is the loss's, the same for mixed and plain targets.
        mixing = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix, "label_smoothing": 0.0}
        self.mixup = Mixup(**mixing, num_classes=len(data.classes)) if mixes else None
        self.schedule = self.new_schedule()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The averaged networks, those that are evaluated and saved."""
        return self.ema.module.networks

    @property
    def updates(self) -> int:
        """Number of updates of the whole training."""
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def updates_done(self) -> int:
        """Number of updates so far."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def speed(self) -> float:
        """Images per second trained in this epoch, evaluation and callbacks left out."""
        return float(self.sums["images"]) / self.seconds if self.seconds else 0.0

    def new_scheduler(self) -> CosineLRScheduler:
        """Cosine decay with warm-up over all updates; it has no memory, so it can be made anew at a switch."""
        return CosineLRScheduler(
            self.optimizer,
            t_initial=self.updates,
            lr_min=self.recipe.min_lr,
            warmup_t=min(round(self.recipe.warmup_epochs * self.steps_per_epoch), self.updates // 5),
            warmup_lr_init=self.recipe.lr / 100,
            t_in_epochs=False,
        )

    def new_ema(self) -> LearnerEma:
        """Average the weights over a window that grows with the number of updates."""
        return LearnerEma(self.learner, decay=self.recipe.ema, use_warmup=True, warmup_power=0.75)

    def new_schedule(self) -> Any:
        """Return the schedule of switches over the main network's convolutions, or None."""
        if self.recipe.schedule is None:
            return None
        from ..models.reparam import reparam_layers
        from .schedule import Schedule

        layers = list(reparam_layers(self.learner.networks[""]))
        if not layers:
            raise FourierBiasError(
                "a schedule needs reparameterizable convolutions: train prs, or use --recast"
            )
        return Schedule.parse(self.recipe.schedule, layers, self.recipe.epochs, by=self.recipe.schedule_by)

    # ------------------------------------------------------------------------------------------ training

    def run_epoch(self, after_step: Callable[["Trainer"], None]) -> None:
        """Train from ``step`` to the end of the epoch."""
        recipe = self.recipe
        plan = plan_epoch(len(self.data.train), recipe.batch_size, recipe.seed, self.epoch)
        self.learner.train()
        batches = training_batches(
            self.data.train,
            plan,
            seed=recipe.seed,
            epoch=self.epoch,
            start=self.step,
            flip=recipe.flip,
            device=self.device,
        )
        started = time.perf_counter()
        for images, targets in batches:
            self.update(images, targets)
            self.step += 1
            now = time.perf_counter()
            self.seconds, started = self.seconds + now - started, now
            after_step(self)
            started = time.perf_counter()

    def update(self, images: Tensor, targets: Tensor) -> None:
        """Take one step of the optimiser. All that is random in it follows from (seed, epoch, step)."""
        number = self.updates_done
        seed = step_seed(self.recipe.seed, self.epoch, self.step)
        torch.manual_seed(seed + 1)  # another stream than the augmentation's
        np.random.seed(seed % 2**32)  # Mixup draws from numpy's global state
        self.scheduler.step_update(number)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with autocast(self.device, self.dtype):
            loss, metrics = self.learner.loss(images, targets, self.epoch / self.recipe.epochs)
        if (self.device.type == "cpu" or self.step % 16 == 0) and not torch.isfinite(loss):
            raise FourierBiasError(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}, step {self.step + 1}; "
                "use a lower learning rate or amp float32"
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.learner, step=number + 1)
        for name, value in {"loss": loss, **metrics, "images": len(images)}.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            weight = 1 if name == "images" else len(images)
            self.sums[name] = self.sums.get(name, 0.0) + value * weight

    def switch(self, names: Sequence[str]) -> None:
        """Make convolutions attention, with parameters of their own in the optimiser and in the average."""
        from ..models.reparam import reparam_layers

        recipe, layers = self.recipe, reparam_layers(self.learner.networks[""])
        torch.manual_seed(step_seed(recipe.seed, self.epoch))
        options = {} if recipe.locality is None else {"locality": recipe.locality}
        before = self.ema.module.state_dict()
        for name in names:
            layers[name].reparameterize(**options)
        new = [parameter for name in names for parameter in layers[name].new_parameters()]
        gates = [parameter for parameter in new if parameter.ndim <= 1]
        others = [parameter for parameter in new if parameter.ndim > 1]
        common = {"lr": recipe.lr, "initial_lr": recipe.lr}
        if gates:
            self.optimizer.add_param_group(
                {"params": gates, **common, "lr_scale": recipe.gate_lr, "weight_decay": 0.0}
            )
        if others:
            self.optimizer.add_param_group({"params": others, **common, "weight_decay": recipe.weight_decay})
        self.scheduler = self.new_scheduler()
        self.ema = self.new_ema()
        self.ema.module.load_state_dict({**self.learner.state_dict(), **before})
        self.switched.append(list(names))

    def switch_due(self) -> None:
        """Switch the layers whose epoch has come; note their names and how far logits moved for the log."""
        if self.schedule is None or self.step > 0:
            return
        done = {name for names in self.switched for name in names}
        due = [name for name in self.schedule.layers if name in self.schedule.switched(self.epoch) - done]
        self.switch_log = {"switched": " ".join(due), "logit_change": ""}
        if due:
            network = self.learner.networks[""]
            fixed = self.data.evaluation.take(torch.arange(min(64, len(self.data.evaluation))))
            images, _ = next(evaluation_batches(fixed, device=self.device))
            before = logits_of(network, images)
            self.switch(due)
            self.switch_log["logit_change"] = (logits_of(network, images) - before).abs().max().item()

    # ---------------------------------------------------------------------------------------- evaluation

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate, and move on to the next epoch; return the row that the log gets."""
        started = time.perf_counter()
        images = float(self.sums["images"])
        means = {name: float(value) / images for name, value in self.sums.items() if name != "images"}
        row = {
            "epoch": self.epoch + 1,
            "train_loss": means.pop("loss"),
            "train_accuracy": means.pop("accuracy", ""),
        }
        last = self.epoch + 1 == self.recipe.epochs
        evaluated = last or (self.epoch + 1) % self.recipe.evaluate_every == 0
        for suffix, network in self.networks.items():
            # What the checkpoint states is measured in float32, as anyone who recomputes it will do.
            dtype = None if last else self.dtype
            found = evaluate(network, self.data, self.device, dtype=dtype) if evaluated else {}
            prefix = f"{suffix}_" if suffix else ""
            row |= {f"{prefix}test_{name}": found.get(name, "") for name in ("loss", "accuracy")}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = self.speed
        row["seconds"] = self.seconds + time.perf_counter() - started
        self.history.append({**row, **means, **self.switch_log})
        self.layer_history += layer_rows(self.epoch + 1, self.networks[""])
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, {}, 0.0
        return self.history[-1]

    def checkpoint(self, suffix: str) -> Checkpoint:
        """Return the averaged network of that suffix as it is now."""
        network = self.networks[suffix]
        prefix = f"{suffix}_" if suffix else ""
        row = {key: value for key, value in self.history[-1].items() if value != ""}
        own = {f"test_{key}": row[f"{prefix}test_{key}"] for key in ("accuracy", "loss")}
        seen = sum(entry["images_per_second"] for entry in self.history) / len(self.history)
        return Checkpoint(
            **built_from(network),
            state_dict=network.state_dict(),
            classes=self.data.classes,
            preprocessing=self.data.train.preprocessing,
            recipe={**self.recipe.as_dict(), "data": self.data.description},
            metrics={
                **row,
                **own,
                "evaluated_on": self.data.description["evaluated_on"],
                "identity": self.identity(),
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "images_per_second": seen,
            },
            epoch=self.epoch,
            weights=f"exponential average of the trained weights, decay {self.recipe.ema} after warm-up",
        )

    # -------------------------------------------------------------------------------------------- state

    def identity(self) -> dict[str, Any]:
        """Return what a resumed training must have in common with the interrupted one."""
        return {
            **{key: value for key, value in built_from(self.learner.networks[""]).items()},
            "learner": type(self.learner).__name__,
            "data": self.data.description["fingerprint"],
            **{key: value for key, value in self.recipe.as_dict().items() if key not in MAY_DIFFER},
        }

    def save_state(self, path: Path) -> None:
        """Write all that is needed to go on from here."""
        progress = ("epoch", "step", "history", "layer_history", "switched", "switch_log", "seconds", "best")
        save_torch(
            path,
            {
                "format": "fourierbias-state",
                "identity": self.identity(),
                **{name: getattr(self, name) for name in progress},
                "sums": {name: float(value) for name, value in self.sums.items()},
                "learner": self.learner.state_dict(),
                "ema": self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def load_state(self, path: Path) -> None:
        """Go back to a saved state; FourierBiasError if it is of another training."""
        state = load_torch(path, "training state")
        if state.get("format") != "fourierbias-state":
            raise FourierBiasError(f"{path} is no training state; --overwrite starts anew")
        compare_identity(path, state["identity"], self.identity())
        for names in state["switched"]:
            self.switch(names)
        self.learner.load_state_dict(state["learner"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("epoch", "step", "history", "layer_history", "switch_log", "seconds", "best"):
            setattr(self, name, state[name])
        sums = state["sums"].items()
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in sums
        }


def built_from(network: nn.Module) -> dict[str, Any]:
    """Return arch, arch_args and recast of a network, from `create` or from timm's own record."""
    if hasattr(network, "built_from"):
        return dict(network.built_from)
    arch = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if arch is None or not is_model(arch):
        raise FourierBiasError(
            f"cannot tell how to rebuild {type(network).__name__} from a checkpoint; register it with timm and "
            "give its name"
        )
    return {"arch": arch, "arch_args": {}, "recast": None}


def layer_rows(epoch: int, network: nn.Module) -> list[dict[str, Any]]:
    """Return one log row for every layer that keeps statistics of itself (gates, attention distance)."""
    layers = [(name, module) for name, module in network.named_modules() if hasattr(module, "statistics")]
    return [{"epoch": epoch, "layer": name, **layer.statistics()} for name, layer in layers]


def compare_identity(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise FourierBiasError naming the first setting in which two trainings differ."""
    for key in new:
        if old.get(key) != new[key]:
            raise FourierBiasError(
                f"{path} was trained with {key} {old.get(key)!r}, not {new[key]!r}; "
                "give the same, or --overwrite to start anew"
            )


# ------------------------------------------------------------------------------------------------- train


def train(
    model: str | nn.Module = "cnn",
    data: str | Path | Data = "photos",
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    recast: Mapping[str, Any] | None = None,
    learner: Callable[[nn.Module, Recipe], Learner] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    on_step: Callable[[Trainer], None] | None = None,
    on_epoch_end: Sequence[Callable[[int, dict[str, nn.Module]], None]] = (),
) -> Result:
    """Train a network and write ``output`` (NAME.ckpt) with NAME.best.ckpt and the log NAME.csv beside it.

    ``model`` is a timm name (with ``model_args``, and ``recast`` as for `create`) or a network that timm
    built; ``data`` as for `load_data`; ``learner`` makes the `Learner` of a model (default: `Classifier`).
    While under way all is kept in NAME.state; ``resume`` goes on from it (or starts, if there is none) and
    ends with the same weights as without interruption. ``on_step`` is called after every update with the
    `Trainer`, ``on_epoch_end`` with the number of epochs done (0 before the first) and the averaged networks;
    after a kill it may be called again for the same epoch. Sets torch's and numpy's random state.

    Raises FourierBiasError for bad input and for a loss that is not finite; TrainingInterruptedError after
    Ctrl-C, with the state saved.
    """
    recipe = recipe or Recipe()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    console = Console(stderr=True, quiet=not progress)
    files = Files(output_path(model if isinstance(model, str) else type(model).__name__.lower(), output))
    check_output(files, resume, overwrite)
    trainer = set_up(model, data, recipe, dict(model_args or {}), recast, learner, device, console)
    if resume and files.state.exists():
        trainer.load_state(files.state)
        say(console, f"going on from {files.state}: epoch {trainer.epoch + 1}, step {trainer.step + 1}")
    elif resume and files.checkpoint.exists():
        return finished(files, trainer)
    elif overwrite:
        for path in (files.state, files.checkpoint, files.best):
            path.unlink(missing_ok=True)
    if trainer.schedule is not None:
        say(console, trainer.schedule.table())
    if trainer.epoch == trainer.step == 0:
        for call in on_epoch_end:
            call(0, trainer.networks)

    with stop_signals() as stop, progress_bar(console, trainer.updates, trainer.updates_done) as show:
        saved = time.monotonic()

        def after_step(trainer: Trainer) -> None:
            nonlocal saved
            show(
                trainer.updates_done,
                f"epoch {trainer.epoch + 1}/{recipe.epochs}  {trainer.speed:.0f} images/s",
            )
            if on_step is not None:
                on_step(trainer)
            if stop.is_set() or time.monotonic() - saved >= recipe.save_every:
                trainer.save_state(files.state)
                saved = time.monotonic()
            if stop.is_set():
                raise TrainingInterruptedError(
                    f"stopped in epoch {trainer.epoch + 1} of {recipe.epochs}; the same command with --resume "
                    "goes on from here"
                )

        while trainer.epoch < recipe.epochs:
            trainer.switch_due()
            trainer.run_epoch(after_step)
            row = trainer.finish_epoch()
            say(console, epoch_line(row, recipe.epochs))
            for call in on_epoch_end:
                call(trainer.epoch, trainer.networks)
            write_outputs(files, trainer)
            trainer.save_state(files.state)
            saved = time.monotonic()
    files.state.unlink(missing_ok=True)
    return Result(files.checkpoint, trainer.history[-1], trainer.history)


def set_up(
    model: str | nn.Module,
    data: str | Path | Data,
    recipe: Recipe,
    model_args: dict[str, Any],
    recast: Mapping[str, Any] | None,
    learner: Callable[[nn.Module, Recipe], Learner] | None,
    device: torch.device,
    console: Console,
) -> Trainer:
    """Load the data as the model wants it, build the model with as many classes, and make a trainer of them."""
    if isinstance(model, str):
        check_arch(model)
        config = get_pretrained_cfg(model)
        preprocessing = resolve_data_config(pretrained_cfg=config.to_dict())
        if recipe.image_size is not None:
            preprocessing["input_size"] = (3, recipe.image_size, recipe.image_size)
            if config.fixed_input_size:
                model_args = {"img_size": recipe.image_size, **model_args}
    else:
        preprocessing = resolve_model_data_config(model)
    if not isinstance(data, Data):
        data = load_data(
            data,
            preprocessing,
            fraction=recipe.fraction,
            holdout=recipe.holdout,
            progress=console.is_terminal and not console.quiet,
            say=lambda line: say(console, line),
        )
    torch.manual_seed(step_seed(recipe.seed, 0))
    if isinstance(model, str):
        if recipe.drop_path:
            model_args = {**model_args, "drop_path_rate": recipe.drop_path}
        model = create(model, num_classes=len(data.classes), recast=recast, **model_args)
    elif model.num_classes != len(data.classes):
        raise FourierBiasError(
            f"the model has {model.num_classes} classes, the data have {len(data.classes)}"
        )
    made = Classifier(model, recipe.smoothing) if learner is None else learner(model, recipe)
    trainer = Trainer(made, data, recipe, device)
    counts = f"{len(data.train)} images to train on, {len(data.evaluation)} to evaluate on"
    arithmetic = "float32" if trainer.dtype is None else "bfloat16 where it is safe"
    say(
        console,
        f"{data.description['source']}: {counts}, {len(data.classes)} classes; {device}, {arithmetic}",
    )
    return trainer


def write_outputs(files: Files, trainer: Trainer) -> None:
    """Write the log, and after an evaluation the checkpoints."""
    write_csv(files.beside(".csv"), trainer.history)
    if trainer.layer_history:
        write_csv(files.beside(".layers.csv"), trainer.layer_history)
    accuracy = trainer.history[-1]["test_accuracy"]
    if accuracy == "":
        return
    for suffix in trainer.networks:
        path = files.beside(f".{suffix}.ckpt") if suffix else files.checkpoint
        save_checkpoint(path, trainer.checkpoint(suffix))
    if accuracy > trainer.best:
        trainer.best = accuracy
        save_checkpoint(files.best, trainer.checkpoint(""))


def finished(files: Files, trainer: Trainer) -> Result:
    """Return the result of a training that has come to its end, if it is the one asked for."""
    checkpoint = read_checkpoint(files.checkpoint)
    if checkpoint.epoch < checkpoint.recipe.get("epochs", 0):
        raise FourierBiasError(
            f"{files.checkpoint} is of epoch {checkpoint.epoch} and {files.state} is gone: --overwrite starts anew"
        )
    compare_identity(files.checkpoint, checkpoint.metrics["identity"], trainer.identity())
    return Result(files.checkpoint, checkpoint.metrics)
