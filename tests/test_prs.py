import timm
import torch
from test_reparam import _one_thread  # noqa: F401  (a fixture for all tests here)

from fourierbias.models import cnn, prs  # noqa: F401  (registers both)
from fourierbias.models.reparam import attention_statistics, reparam_layers
from fourierbias.training.schedule import Schedule


def test_prs_is_cnn_until_it_switches():
    reference, model = timm.create_model("cnn").eval(), timm.create_model("prs").eval()
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), reference(images))
    assert model.pretrained_cfg["input_size"] == reference.pretrained_cfg["input_size"]
    assert not any(layer.is_attention for layer in reparam_layers(model).values())


def test_prs_starts_as_cnn_does():
    weights = []
    for name in ("cnn", "prs"):
        torch.manual_seed(3)
        weights.append(timm.create_model(name).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_every_epoch_of_a_schedule_is_a_proper_network():
    model = timm.create_model("prs", num_classes=4)
    layers = reparam_layers(model)
    assert list(layers) == [f"layer3.{i}.conv{j}" for i in range(4) for j in (1, 2)] + [
        f"layer4.{i}.conv{j}" for i in range(2) for j in (1, 2)
    ]
    images, targets = torch.randn(4, 3, 32, 32), torch.arange(4)
    schedule = Schedule.parse("late-first", layers, epochs=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for epoch in range(4):
        before = model.eval()(images)
        for name in schedule.switched(epoch):
            if not layers[name].is_attention:
                optimizer.add_param_group({"params": layers[name].reparameterize().new_parameters()})
        if epoch == 0:  # the first layer to switch has a closed gate, and nothing has trained
            assert torch.equal(model(images), before)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(model.train()(images), targets)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    switched = [name for name, layer in layers.items() if layer.is_attention]
    assert switched == [name for name in layers if name in schedule.switched(3)]
    fresh = timm.create_model("prs", num_classes=4).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images), model.eval()(images))
    found = attention_statistics(model, images)
    assert {name for name, values in found.items() if values["gate"] != 0} == set(switched)


def test_other_layers_can_be_chosen():
    model = timm.create_model("prs", reparam_layers="layer2.0.conv1")
    assert list(reparam_layers(model)) == ["layer2.0.conv1"]
