"""One training under way: its networks, optimiser, average and place in the epochs, and the steps on them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ..distributed import agree, broadcast, by_first, rank, spread, total, world_size
from ..errors import FourierBiasError
from ..models.checkpoint import Checkpoint, built_from, load_torch, save_torch
from ..models.reparam import attention_statistics, reparam_layers
from ..models.weights import one_line
from .data import Data, Split, evaluation_batches, plan_epoch, share, step_seed, training_batches
from .learner import Learner, LearnerEma, autocast, evaluation_sums, fit_machine, logits_of, means
from .parallel import LossFunction, global_batch_norm, global_loss
from .recipe import Recipe

MAY_DIFFER = {"save_every"}  # settings that a resumed training may change: they leave the result as it is


class Run:
    """All that changes while training, with the steps of the loop as methods.

    ``epoch`` and ``step`` say what comes next; ``history`` holds the log's rows of finished epochs. With
    several processes each has a run of its own, and all are the same but for their share of each batch.
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
        plan = plan_epoch(len(data.train), recipe.batch_size, recipe.seed, 0)
        self.steps_per_epoch = len(plan)
        fit_machine(learner, device, self.dtype)
        options = {"fused": True} if recipe.opt == "adamw" else {}
        with one_line(f"optimiser {recipe.opt} cannot be used; nmuon, adamw and sgd can"):
            if get_optimizer_info(recipe.opt).second_order:
                raise ValueError("it needs second derivatives")
            self.optimizer = create_optimizer_v2(
                learner, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **options
            )
        self.scheduler = self.new_scheduler()
        self.ema = self.new_ema()
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        # Smoothing is the loss's, the same for mixed and plain targets.
        mixing = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix, "label_smoothing": 0.0}
        self.mixup = Mixup(**mixing, num_classes=len(data.classes)) if mixes else None
        if len(share(plan[0], world_size() - 1, world_size(), pairs=mixes)) == 0:
            raise FourierBiasError(
                f"a batch of {len(plan[0])} images cannot be shared by {world_size()} processes; "
                "use a larger batch size or fewer processes"
            )
        self.schedule = self.new_schedule()
        self.global_loss: LossFunction | None = None

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

    @property
    def arithmetic(self) -> str:
        """What the forward pass computes in: float32, or bfloat16 where that is safe."""
        return "float32" if self.dtype is None else "bfloat16"

    def new_scheduler(self) -> CosineLRScheduler:
        """Cosine decay with warm-up over all updates; it has no memory, so a switch makes it anew."""
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
        from .schedule import Schedule

        found = reparam_layers(self.learner.networks[""])
        layers = [name for name, layer in found.items() if not layer.is_attention]
        if not layers:
            raise FourierBiasError(
                "a schedule needs reparameterizable convolutions: train prs, or name with --recast those of "
                "another network"
            )
        return Schedule.parse(self.recipe.schedule, layers, self.recipe.epochs, by=self.recipe.schedule_by)

    @property
    def learner_record(self) -> dict[str, Any]:
        """The kind of learner and its plain attributes."""
        own = {key: value for key, value in vars(self.learner).items() if key[0] != "_" and key != "training"}
        plain = {key: value for key, value in own.items() if isinstance(value, (bool, int, float, str))}
        return {"name": type(self.learner).__name__, **plain}

    @cached_property
    def fixed_images(self) -> Tensor:
        """The first images (64, C, H, W) of the evaluation, on which switches and layers are watched."""
        fixed = self.data.evaluation.take(torch.arange(min(64, len(self.data.evaluation))))
        return next(evaluation_batches(fixed, device=self.device))[0]

    @cached_property
    def own_evaluation(self) -> Split:
        """The share of the evaluation images that falls to this process."""
        whole = self.data.evaluation
        return (
            whole if world_size() == 1 else whole.take(share(torch.arange(len(whole)), rank(), world_size()))
        )

    # ------------------------------------------------------------------------------------------ training

    def run_epoch(self, after_step: Sequence[Callable[["Run"], None]]) -> None:
        """Train from ``step`` to the end of the epoch."""
        recipe = self.recipe
        plan = plan_epoch(len(self.data.train), recipe.batch_size, recipe.seed, self.epoch)
        self.learner.train()
        self.global_loss = self.global_loss or global_loss(self.learner)
        batches = training_batches(
            self.data.train,
            plan,
            seed=recipe.seed,
            epoch=self.epoch,
            start=self.step,
            flip=recipe.flip,
            rank=rank(),
            world_size=world_size(),
            pairs=self.mixup is not None,
            device=self.device,
        )
        started = time.perf_counter()
        for images, targets in batches:
            self.update(images, targets)
            self.step += 1
            now = time.perf_counter()
            self.seconds, started = self.seconds + now - started, now
            for call in after_step:
                call(self)
            started = time.perf_counter()

    def update(self, images: Tensor, targets: Tensor) -> None:
        """Take one step of the optimiser. All that is random in it follows from (seed, epoch, step)."""
        number = self.updates_done
        seed = step_seed(self.recipe.seed, self.epoch, self.step)
        torch.manual_seed(
            seed + 1 + rank()
        )  # another stream than the augmentation's, and one for each process
        np.random.seed(seed % 2**32)  # Mixup draws from numpy's global state, the same on every process
        self.scheduler.step_update(number)
        if self.mixup is not None:
            if len(images) % 2:  # an image could not be read, and mixing wants pairs
                images, targets = torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]])
            images, targets = self.mixup(images, targets)
        with autocast(self.device, self.dtype), global_batch_norm():
            loss, metrics = self.global_loss(images, targets, self.epoch / self.recipe.epochs)
        sums = self.global_sums({"loss": loss, **metrics}, len(images))
        if (self.device.type == "cpu" or self.step % 16 == 0) and not torch.isfinite(sums["loss"]):
            raise FourierBiasError(
                f"the loss is {(sums['loss'] / sums['images']).item()} in epoch {self.epoch + 1}, "
                f"step {self.step + 1}; use a lower learning rate or amp float32"
            )
        # Gradients are averaged over processes: each counts by its share of the batch, a single one by 1.
        weight = len(images) * world_size() / sums["images"]
        (loss * weight.to(loss.dtype)).backward()
        self.optimizer.step()
        for layer in reparam_layers(self.learner.networks[""]).values():
            layer.bound_gate()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.learner, step=number + 1)
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in sums.items()}

    def global_sums(self, batch_means: Mapping[str, Any], count: int) -> dict[str, Tensor]:
        """Return means over ``count`` images as sums over the global batch, and its number of ``images``."""
        values = [
            torch.as_tensor(value, dtype=torch.float64, device=self.device).detach() * count
            for value in batch_means.values()
        ]
        number = torch.full((), count, dtype=torch.float64, device=self.device)
        sums = total(torch.stack([*values, number]))
        return dict(zip([*batch_means, "images"], sums.unbind(), strict=True))

    def switch(self, names: Sequence[str]) -> None:
        """Make convolutions attention, with parameters of their own in the optimiser and in the average."""
        recipe, layers = self.recipe, reparam_layers(self.learner.networks[""])
        torch.manual_seed(step_seed(recipe.seed, self.epoch))
        locality = math.inf if recipe.locality is None else recipe.locality
        before = self.ema.module.state_dict()
        for name in names:
            layers[name].reparameterize(recipe.gate, locality)
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
        self.close()  # parameters have come in
        self.switched.append(list(names))

    def switch_due(self) -> None:
        """Switch the layers whose epoch has come; note their names and how far logits moved for the log."""
        if self.schedule is None or self.step > 0:
            return
        done = {name for names in self.switched for name in names}
        due = [name for name in self.schedule.layers if name in self.schedule.switched(self.epoch) - done]
        self.switch_log = {"switched": " ".join(due), "logit_change": ""}
        if due:
            network, images = self.learner.networks[""], self.fixed_images
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
            found = self.evaluate(network, dtype) if evaluated else {}
            prefix = f"{suffix}_" if suffix else ""
            row |= {f"{prefix}test_{name}": found.get(name, "") for name in ("loss", "accuracy")}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = self.speed
        row["seconds"] = self.seconds + time.perf_counter() - started
        self.history.append({**row, **means, **self.switch_log})
        if reparam_layers(self.networks[""]):
            self.layer_history += layer_rows(self.epoch + 1, self.networks[""], self.fixed_images)
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, {}, 0.0
        return self.history[-1]

    def evaluate(self, network: nn.Module, dtype: torch.dtype | None) -> dict[str, float]:
        """Return accuracy and loss on the evaluation images, of which each process sees its share."""
        return means(total(evaluation_sums(network, self.own_evaluation, self.device, dtype=dtype)))

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
            recipe={**self.recipe.as_dict(), "learner": self.learner_record, "data": self.data.description},
            metrics={
                **row,
                **own,
                "evaluated_on": self.data.description["evaluated_on"],
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "images_per_second": seen,
                "arithmetic": self.arithmetic,
            },
            epoch=self.epoch,
            weights=f"exponential average of the trained weights, decay {self.recipe.ema} after warm-up",
        )

    # -------------------------------------------------------------------------------------------- state

    def close(self) -> None:
        """Let go of what connects this process with the others."""
        self.global_loss = None

    def follow_first(self) -> None:
        """Start from the first process's weights; FourierBiasError if another has other data or settings."""
        own, first = self.identity(), broadcast(self.identity())
        other = [key for key in own if own[key] != first.get(key)]
        agree(
            FourierBiasError(f"processes must be given the same, they differ in {other[0]}")
            if other
            else None
        )
        spread([*self.learner.state_dict().values(), *self.ema.module.state_dict().values()])

    def identity(self) -> dict[str, Any]:
        """Return what a resumed training must have in common with the interrupted one."""
        recipe = {**self.recipe.as_dict(), "learner": self.learner_record, "data": self.data.description}
        return identity(built_from(self.learner.networks[""]), recipe)

    def save_state(self, path: Path) -> None:
        """Write all that is needed to go on from here."""
        progress = ("epoch", "step", "history", "layer_history", "switched", "switch_log", "seconds", "best")
        save_torch(
            path,
            {
                "format": "fourierbias-state",
                "identity": self.identity(),
                "arithmetic": self.arithmetic,
                **{name: getattr(self, name) for name in progress},
                "sums": {name: float(value) for name, value in self.sums.items()},
                "learner": self.learner.state_dict(),
                "ema": self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def load_state(self, path: Path) -> None:
        """Go back to a state that the first process has; FourierBiasError if it is of another training."""
        state = by_first(lambda: load_torch(path, "training state"))
        if state.get("format") != "fourierbias-state":
            raise FourierBiasError(f"{path} is no training state; --overwrite starts anew")
        compare_identity(path, state["identity"], self.identity())
        # A machine that would choose another goes on in the arithmetic that the training began in.
        begun_in = replace(self.recipe, amp=state.get("arithmetic", self.arithmetic))
        self.dtype = begun_in.autocast_dtype(self.device)
        fit_machine(self.learner, self.device, self.dtype)
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


def layer_rows(epoch: int, network: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return a log row for every reparameterizable layer: its form, gate and attention distance."""
    layers, found = reparam_layers(network), attention_statistics(network, images)
    forms = {name: "attention" if layer.is_attention else "conv" for name, layer in layers.items()}
    return [{"epoch": epoch, "layer": name, "form": forms[name], **found[name]} for name in found]


def identity(network: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make the result of a training, from its network's record and its recipe."""
    settings = {key: value for key, value in recipe.items() if key not in MAY_DIFFER}
    settings["data"] = recipe["data"]["fingerprint"]
    return {**{key: network[key] for key in ("arch", "arch_args", "recast")}, **settings}


def compare_identity(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise FourierBiasError naming the first setting in which two trainings differ."""
    for key in new:
        if old.get(key) != new[key]:
            raise FourierBiasError(
                f"{path} was trained with {key} {old.get(key)!r}, not {new[key]!r}; "
                "give the same, or --overwrite to start anew"
            )
