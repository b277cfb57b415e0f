"""Bootstrapping: the loss term by term, the sharing through training, and what is left on the disk."""

import copy
import csv
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import fourierbias.models.agent
import fourierbias.models.eit
import fourierbias.models.lsra
import fourierbias.models.vit  # noqa: F401
from fourierbias.errors import FourierBiasError
from fourierbias.models._cfg import CIFAR10_MEAN, CIFAR10_STD
from fourierbias.models.checkpoint import build, create, read_checkpoint
from fourierbias.training.bootstrap import (
    Bootstrap,
    align,
    bootstrap,
    hint_decay,
    hint_loss,
    make_agent,
    mutual_loss,
)
from fourierbias.training.data import Data, Split
from fourierbias.training.recipe import Recipe
from fourierbias.training.trainer import train

SMALL = {"depth": 2, "embed_dim": 36}
RECIPE = Recipe(epochs=2, batch_size=8, amp="float32")


def small_vit(**kwargs):
    return create("vit", **{"num_classes": 3, **SMALL, **kwargs})


def little_data():
    """Twenty-four random images of three classes, the last eight to evaluate on."""
    preprocessing = {
        **{"input_size": (3, 32, 32), "mean": CIFAR10_MEAN, "std": CIFAR10_STD},
        **{"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},
    }
    pixels = torch.randint(
        0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    labels = torch.arange(24) % 3
    names = [f"{i:02d}" for i in range(24)]
    splits = [
        Split(labels[part], names[part], preprocessing, pixels=pixels[part])
        for part in (slice(16), slice(16, 24))
    ]
    description = {"source": "random", "evaluated_on": "test", "fingerprint": "none"}
    return Data(*splits, ["a", "b", "c"], description)


def correlation(a, b):
    """Mean over images and positions of the correlation of two maps (B, D, H, W) over channels."""
    rows = [np.asarray(x, dtype=np.float64).transpose(0, 2, 3, 1).reshape(-1, x.shape[1]) for x in (a, b)]
    return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(*rows, strict=True)])


class Stopped(Exception):  # noqa: N818
    pass


def resumed(tmp_path, model, after, **options):
    """Train ``model`` once through and once killed after so many updates and resumed; paths of both."""
    paths = [tmp_path / "whole.ckpt", tmp_path / "parts.ckpt"]
    train(model, little_data(), paths[0], RECIPE, progress=False, **options)

    def kill(run):
        if run.updates_done == after:
            raise Stopped

    saving = replace(RECIPE, save_every=0.0)
    with pytest.raises(Stopped):
        train(model, little_data(), paths[1], saving, progress=False, on_step=[kill], **options)
    train(model, little_data(), paths[1], RECIPE, progress=False, resume=True, **options)
    return paths


def assert_same_weights(first, second):
    first, second = (read_checkpoint(path).state_dict for path in (first, second))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("grid", [(8, 8), (3, 5)])
def test_hint_is_two_minus_twice_the_correlation(grid):
    vit, agent = (torch.randn(2, 60, *grid) * 3 + 1 for _ in range(2))
    agent += 0.5 * vit
    expected = 2 - 2 * correlation(vit, agent)
    assert 0.3 < expected < 1.9
    assert hint_loss(vit, agent).item() == pytest.approx(expected, abs=1e-5)
    # The scale and the mean of a token have no part in it, and it is eq. 6 on centred tokens.
    assert hint_loss(7 * vit - 2, agent).item() == pytest.approx(expected, abs=1e-5)
    units = [F.normalize(x.double() - x.double().mean(1, keepdim=True), dim=1) for x in (vit, agent)]
    assert (units[0] - units[1]).square().sum(1).mean().item() == pytest.approx(expected, abs=1e-9)


def test_hint_teaches_the_student_only():
    student, teacher = (torch.randn(2, 16, 4, 4, requires_grad=True) for _ in range(2))
    hint_loss(student, teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("epochs", [2, 3, 5, 7, 30, 100, 240])
def test_hint_decays_linearly_to_exactly_zero_in_the_last_epoch(epochs):
    factors = [hint_decay(epoch / epochs, epochs) for epoch in range(epochs)]
    assert factors[0] == 1.0
    assert factors[-1] == 0.0
    np.testing.assert_allclose(np.diff(factors), -1 / (epochs - 1), atol=1e-12)
    within = [hint_decay((epoch + 0.7) / epochs, epochs) for epoch in range(epochs)]
    assert within == factors


def test_a_single_epoch_is_the_last():
    assert hint_decay(0.0, 1) == 0.0


def test_two_dimensional_alignment_averages_blocks():
    fine, coarse = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    a, b = align(fine, coarse)
    blocks = fine.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(a, blocks.flatten(2).transpose(1, 2))
    torch.testing.assert_close(b, coarse.flatten(2).transpose(1, 2))
    swapped = align(coarse, fine)
    torch.testing.assert_close(swapped[0], b)
    torch.testing.assert_close(swapped[1], a)


def test_one_dimensional_alignment_is_not_spatial():
    # 28×28 to 14×14 in runs of four raster positions: token (3, 3) meets row 6, columns 12 to 15.
    rows = torch.arange(28.0).view(1, 1, 28, 1).expand(1, 1, 28, 28)
    columns = rows.transpose(2, 3)
    fine = torch.cat([rows, columns], dim=1)
    tokens, _ = align(fine, torch.zeros(1, 2, 14, 14), "1d")
    assert tokens[0, 3 * 14 + 3].tolist() == [6, 13.5]
    assert tokens[0, 7].tolist() == [1, 1.5]
    spatial, _ = align(fine, torch.zeros(1, 2, 14, 14), "2d")
    assert spatial[0, 3 * 14 + 3].tolist() == [6.5, 6.5]


def test_lengths_that_do_not_divide_are_refused_in_one_dimension_only():
    a, b = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3)
    with pytest.raises(FourierBiasError, match="25 tokens cannot be averaged to 9"):
        align(a, b, "1d")
    assert align(a, b)[0].shape == align(a, b)[1].shape == (1, 9, 4)


def test_mutual_loss_is_softened_divergence():
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    q, p = (np.exp(x.detach().double().numpy() / 4) for x in (student, teacher))
    q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
    expected = 16 * (p * np.log(p / q)).sum(1).mean()
    loss = mutual_loss(student, teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(("mode", "scale"), [("joint", 1.0), ("shared", 0.5)])
@pytest.mark.parametrize("form", ["agent", "agent_res"])
def test_loss_is_the_sum_of_its_parts(mode, scale, form):
    learner = Bootstrap(small_vit(), form, mode=mode, epochs=5, smoothing=0.1).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        loss, parts = learner.loss(images, labels, progress=2 / 5)
        vit, agent = learner.vit(images), learner.agent(images)
        smooth = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
        entropies = [-(smooth * x.log_softmax(1)).sum(1).mean() for x in (vit, agent)]
        hint = 0.0
        maps = {}
        hooks = [
            net.blocks[i].register_forward_hook(lambda m, a, out, key=(name, i): maps.update({key: out}))
            for name, net in (("vit", learner.vit), ("agent", learner.agent))
            for i in range(2)
        ]
        learner.vit(images), learner.agent(images)
        for hook in hooks:
            hook.remove()
        for i in range(2):
            tokens = maps["vit", i][:, 1:].transpose(1, 2).unflatten(2, (8, 8))
            hint += 2 - 2 * correlation(tokens, F.adaptive_avg_pool2d(maps["agent", i], 8).numpy())
    expected = sum(entropies) + mutual_loss(vit, agent) + mutual_loss(agent, vit) + 10 * 0.5 * hint
    assert loss.item() == pytest.approx(scale * expected.item(), rel=1e-3)
    assert parts["hint"].item() == pytest.approx(hint, rel=1e-3)
    assert parts["hint_weight"] == scale * 10 * 0.5
    assert parts["accuracy"].item() == (vit.argmax(1) == labels).float().mean().item()
    assert parts["agent_train_accuracy"].item() == (agent.argmax(1) == labels).float().mean().item()


def test_settings_reach_the_loss():
    vit, images, labels = small_vit(), torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    assert bootstrap("joint")(vit, Recipe(smoothing=0.3)).smoothing == 0.3
    learners = [Bootstrap(vit, "agent_res", epochs=5, alignment=a).eval() for a in ("2d", "1d")]
    learners[1].load_state_dict(learners[0].state_dict())
    two, one = (learner.loss(images, labels, 0.0)[1]["hint"].item() for learner in learners)
    assert two != pytest.approx(one, rel=1e-3)


def test_no_hint_in_the_last_epoch():
    learner = Bootstrap(small_vit(), epochs=4)
    _, parts = learner.loss(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), progress=3 / 4)
    assert parts["hint_weight"] == 0
    assert "hint" not in parts


def test_mixed_targets_are_taken():
    learner = Bootstrap(small_vit(), epochs=2).eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    hard, _ = learner.loss(images, labels, 0.0)
    soft, parts = learner.loss(images, F.one_hot(labels, 3).float(), 0.0)
    torch.testing.assert_close(hard, soft)
    assert parts["accuracy"] == (learner.vit(images).argmax(1) == labels).float().mean()


def test_joint_networks_learn_apart():
    # Each network's gradient is that of its own part of the loss, as with the authors' two optimisers.
    learner = Bootstrap(small_vit(), epochs=2)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    learner.loss(images, labels, 0.0)[0].backward()
    grads = [p.grad.clone() for p in learner.agent.parameters()]
    learner.zero_grad()
    agent = learner.agent(images)
    own = F.cross_entropy(agent, labels) + mutual_loss(agent, learner.vit(images))
    own.backward()
    for grad, parameter in zip(grads, learner.agent.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_step_in_shared_mode_keeps_the_parameters_shared():
    learner = Bootstrap(small_vit(), mode="shared", epochs=3)
    pairs = [
        (own.token_mixer.attention, own.mlp, block.attn, block.mlp)
        for own, block in zip(learner.agent.blocks, learner.vit.blocks, strict=True)
    ]
    identities = [(id(p), p.data_ptr()) for block in learner.vit.blocks for p in block.parameters()]
    before = copy.deepcopy(learner.vit.state_dict())
    optimizer = timm.optim.create_optimizer_v2(learner, opt="adamw", lr=1e-2)
    given = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(given) == len({id(p) for p in given})
    loss, _ = learner.loss(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), 0.0)
    loss.backward()
    optimizer.step()
    after = [(id(p), p.data_ptr()) for block in learner.vit.blocks for p in block.parameters()]
    assert after == identities
    for (attention, mlp, *theirs), own in zip(pairs, learner.agent.blocks, strict=True):
        assert own.token_mixer.attention is attention is theirs[0]
        assert own.mlp is mlp is theirs[1]
        assert own.token_mixer.attention.proj.weight is theirs[0].proj.weight
    moved = [key for key, value in learner.vit.state_dict().items() if not torch.equal(value, before[key])]
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight", "blocks.1.mlp.fc1.weight"} <= set(moved)


def test_shared_gradients_are_the_sum_of_both_networks():
    learner = Bootstrap(small_vit(), mode="shared", epochs=1, mutual_weight=0.0)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    weight = learner.vit.blocks[0].attn.proj.weight
    learner.loss(images, labels, 0.0)[0].backward()
    both = weight.grad.clone()
    parts = []
    for network in (learner.vit, learner.agent):
        learner.zero_grad()
        (0.5 * F.cross_entropy(network(images), labels)).backward()
        parts.append(weight.grad.clone())
    assert all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(both, sum(parts), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "both"}, "choose from joint, shared"),
        ({"alignment": "3d"}, "choose from 2d, 1d"),
        ({"agent": "cnn"}, "choose from agent, agent_res"),
    ],
)
def test_unknown_choices_are_refused(options, match):
    with pytest.raises(FourierBiasError, match=match):
        Bootstrap(small_vit(), epochs=2, **options)


@pytest.mark.parametrize("mode", ["joint", "shared"])
def test_class_counts_that_differ_are_refused(mode):
    agent = create("agent", num_classes=4, **SMALL)
    with pytest.raises(FourierBiasError, match="the agent has 4 classes, the ViT 3"):
        Bootstrap(small_vit(), agent, mode=mode, epochs=2)


def test_blocks_that_cannot_be_paired_are_refused_where_they_must_be():
    agent = create("agent", num_classes=3, depth=3, embed_dim=36)
    with pytest.raises(FourierBiasError, match="cannot be paired"):
        Bootstrap(small_vit(), agent, epochs=2)
    Bootstrap(small_vit(), agent, epochs=2, hint_weight=0.0).loss(
        torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), 0.0
    )


def test_heads_and_networks_without_an_agent_are_refused():
    with pytest.raises(FourierBiasError, match=r"4 heads do not fit .* choose 1, 5 to 9, or 17 to 25"):
        Bootstrap(small_vit(num_heads=4), epochs=2)
    with pytest.raises(FourierBiasError, match="no agent can be built for SmallResNet"):
        make_agent(create("cnn", num_classes=3))


def test_the_agent_is_of_the_vits_shape():
    agent = make_agent(create("vit", num_classes=3, num_heads=6, mlp_ratio=2.0, depth=1))
    assert agent.built_from["arch_args"] == {
        **{"in_chans": 3, "embed_dim": 108, "depth": 1, "num_heads": 6, "mlp_ratio": 2.0, "patch_size": 4}
    }
    assert agent.num_classes == 3


@pytest.mark.parametrize("mode", ["joint", "shared"])
@pytest.mark.parametrize("form", ["agent", "agent_res"])
def test_trained_resumed_and_saved_as_plain_networks(mode, form, tmp_path):
    make = bootstrap(mode, agent=form)
    paths = resumed(tmp_path, "vit", after=3, learner=make, model_args=SMALL)
    assert_same_weights(*paths)
    agents = [path.with_name(f"{path.stem}.agent.ckpt") for path in paths]
    assert_same_weights(*agents)

    vit = read_checkpoint(paths[0])
    timm.create_model("vit", num_classes=3, **SMALL).load_state_dict(vit.state_dict, strict=True)
    agent = read_checkpoint(agents[0])
    assert agent.arch == form
    plain = timm.create_model(form, num_classes=3, **agent.arch_args)
    plain.load_state_dict(agent.state_dict, strict=True)

    # What the files hold is what was evaluated.
    data = little_data()
    images = data.evaluation.pixels.float().sub(255 * torch.tensor(CIFAR10_MEAN).view(3, 1, 1))
    images = images / (255 * torch.tensor(CIFAR10_STD).view(3, 1, 1))
    for checkpoint in (vit, agent):
        with torch.no_grad():
            logits = build(checkpoint)(images)
        assert F.cross_entropy(logits, data.evaluation.labels).item() == pytest.approx(
            checkpoint.metrics["test_loss"], rel=1e-4
        )
    if mode == "shared":
        weights = vit.state_dict["blocks.0.attn.proj.weight"], vit.state_dict["blocks.0.attn.qkv.weight"]
        tap = weights[0][:, 4:8] @ weights[1][2 * 36 + 4 : 2 * 36 + 8]
        torch.testing.assert_close(agent.state_dict["blocks.0.token_mixer.weight"][..., 1], tap)
        assert torch.equal(
            agent.state_dict["blocks.1.mlp.fc1.weight"], vit.state_dict["blocks.1.mlp.fc1.weight"]
        )

    with open(paths[0].with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["hint_weight"]) for row in rows] == [5.0 if mode == "shared" else 10.0, 0.0]
    assert float(rows[0]["hint"]) > 0
    assert rows[1]["hint"] == ""
    assert all(0 <= float(row["agent_test_accuracy"]) <= 1 for row in rows)


@pytest.mark.parametrize("other", [{"mode": "shared"}, {"agent": "agent_res"}, {"hint_weight": 5.0}])
def test_a_training_of_another_kind_is_not_resumed(other, tmp_path):
    def kill(run):
        if run.updates_done == 2:
            raise Stopped

    paths = {"output": tmp_path / "boot.ckpt", "recipe": replace(RECIPE, save_every=0.0), "progress": False}
    with pytest.raises(Stopped):
        train("vit", little_data(), **paths, model_args=SMALL, learner=bootstrap(), on_step=[kill])
    with pytest.raises(FourierBiasError, match="--overwrite to start anew"):
        train("vit", little_data(), **paths, model_args=SMALL, learner=bootstrap(**other), resume=True)


@pytest.mark.parametrize("arch", ["eit", "lsra", "agent", "agent_res"])
def test_new_architectures_are_trained_and_resumed_exactly(arch, tmp_path):
    size = {"eit": {"embed_dim": 40, "depth": 2}, "lsra": {"embed_dim": 36, "depth": 2}}.get(arch, SMALL)
    paths = resumed(tmp_path, arch, after=2, model_args=size)
    assert_same_weights(*paths)
    checkpoint = read_checkpoint(paths[1])
    assert checkpoint.epoch == 2
    with torch.no_grad():
        assert build(checkpoint)(torch.rand(1, 3, 32, 32)).shape == (1, 3)
