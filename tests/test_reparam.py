import copy
import io
import itertools
import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fourierbias.errors import FourierBiasError
from fourierbias.models import reparam
from fourierbias.models.reparam import (
    ReparamConv2d,
    attention_statistics,
    make_reparameterizable,
    positional_attention,
    recast,
    reparam_layers,
)

BACKENDS = ("chunked", "fused")
# Ci, Co, K, stride, (H, W), bias
CASES = [
    (5, 7, 3, 1, (6, 9), True),
    (7, 5, 3, 2, (8, 5), False),
    (3, 6, 3, 2, (7, 7), True),
    (8, 4, 5, 1, (7, 6), False),
    (4, 8, 5, 2, (9, 8), True),
    (6, 6, 5, 2, (4, 3), True),
    (40, 24, 3, 1, (14, 14), False),
    (4, 9, 1, 2, (5, 6), True),
    (2, 3, 7, 1, (3, 8), False),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small are faster on one thread, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(case, dtype=torch.float64, **options):
    """A layer in attention form with its input; the gates, where asked open, differ from head to head."""
    ci, co, K, stride, size, bias = case
    opened = options.pop("opened", False)
    layer = ReparamConv2d(ci, co, K, stride, K // 2, bias=bias, dtype=dtype)
    x = torch.randn(3, ci, *size, dtype=dtype)
    layer.reparameterize(**options)
    if opened:
        with torch.no_grad():
            layer.gate.copy_(torch.randn(K * K, dtype=dtype) / 2)
            layer.query.mul_(50)
            layer.key.mul_(50)
    return layer, x


def plain(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def oracle(layer, x, gate_kind, locality):
    """Gated attention as one would write it down: zero tokens round the grid, whole maps, head by head."""
    K, stride, (H, W) = layer.kernel_size[0], layer.stride[0], x.shape[-2:]
    p, heads = (K - 1) // 2, K * K
    tokens = F.pad(x, (p, p, p, p)).flatten(2).transpose(1, 2)
    places = torch.tensor(list(itertools.product(range(-p, H + p), range(-p, W + p))))
    real = ((places >= 0) & (places < torch.tensor([H, W]))).all(1)
    queries = [i for i, (r, c) in enumerate(places.tolist()) if real[i] and r % stride == 0 == c % stride]
    d = layer.query.shape[0] // heads
    y = 0
    for head, (a, c) in enumerate(itertools.product(range(K), repeat=2)):
        wanted = places[queries] + torch.tensor([a - p, c - p])
        square = ((places[None] - wanted[:, None]) ** 2).sum(-1).to(x.dtype)
        position = (square == 0).to(x.dtype) if locality == math.inf else (-locality * square).softmax(-1)
        q = tokens[:, queries] @ layer.query[head * d : (head + 1) * d].T
        k = tokens @ layer.key[head * d : (head + 1) * d].T
        content = (q @ k.mT / d**0.5).masked_fill(~real, -math.inf).softmax(-1)
        if gate_kind == "linear":
            attention = position + layer.gate[head] * (content - position)
        else:
            s = torch.sigmoid(layer.gate[head])
            attention = (1 - s) * content + s * position
        y = y + attention @ tokens @ layer.weight[:, :, a, c].T
    y = y.transpose(1, 2).unflatten(2, (-(-H // stride), -(-W // stride)))
    return y if layer.bias is None else y + layer.bias[:, None, None]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_switch_keeps_the_function(case, dtype, tolerance, backend):
    ci, co, K, stride, size, bias = case
    layer = ReparamConv2d(ci, co, K, stride, K // 2, bias=bias, dtype=dtype)
    x = torch.randn(3, ci, *size, dtype=dtype)
    before = layer(x)
    assert torch.equal(before, plain(layer, x))
    layer.reparameterize().backend = backend
    assert relative(layer.train()(x), before) < tolerance
    assert torch.equal(layer.eval()(x), before)  # nothing but the convolution is computed


def test_unbatched_input():
    layer, x = make(CASES[0])
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["linear", "sigmoid"])
@pytest.mark.parametrize("locality", [math.inf, 1.5])
@pytest.mark.parametrize("case", CASES[:6])
def test_equals_gated_attention_written_out(case, gate, locality, backend, monkeypatch):
    """Values and all gradients, with chunks of two samples so that the last one is not whole."""
    layer, x = make(case, gate=gate, locality=locality, opened=True)
    layer.backend = backend
    N, Nq = math.prod(case[4]), math.prod(-(-size // case[3]) for size in case[4])
    monkeypatch.setattr(reparam, "CHUNK_BYTES", 2 * layer.heads * Nq * N * 8)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    found, expected = layer(x), oracle(layer, x, gate, locality)
    assert relative(expected, plain(layer, x)) > 0.01  # the content part is there
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", ["linear", "sigmoid"])
def test_gradcheck(gate):
    layer, x = make((2, 1, 3, 2, (3, 2), True), gate=gate, locality=2.0, head_dim=1, opened=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [value.detach().requires_grad_() for value in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x[:2].requires_grad_(), *values))


def test_gate_opens_first_then_queries_and_keys_learn():
    layer, x = make(CASES[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    target = torch.randn_like(layer(x))
    F.mse_loss(layer(x), target).backward()
    assert (layer.gate.grad != 0).all()
    assert layer.query.grad.abs().max() == layer.key.grad.abs().max() == 0
    optimizer.step()
    optimizer.zero_grad()
    F.mse_loss(layer(x), target).backward()
    assert layer.query.grad.abs().max() > 0
    assert layer.key.grad.abs().max() > 0


def test_bounds_are_those_of_the_linear_gate_alone():
    values = torch.tensor([-2.0, -0.0, 0.25, 1.0, 1.5], dtype=torch.float64).repeat(2)[:9]
    for gate, expected in (("linear", values.clamp(0, 1)), ("sigmoid", values)):
        layer, _ = make(CASES[0], gate=gate)
        with torch.no_grad():
            layer.gate.copy_(values)
        layer.bound_gate()
        assert torch.equal(layer.gate, expected)
    convolution = ReparamConv2d(4, 4, 3, padding=1)
    convolution.bound_gate()
    assert not convolution.is_attention


@pytest.mark.parametrize(
    ("locality", "leak"),  # one minus the mass on the wanted token
    [(0.5, 0.84), (1, 0.68), (2, 0.38), (4, 6.9e-2), (6, 9.8e-3), (8, 1.3e-3), (10, 1.8e-4), (16, 4.5e-7)],
)
def test_error_follows_locality(locality, leak):
    maps = positional_attention(3, (25, 25), locality=locality, ring=True, dtype=torch.float64)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    middle = maps[25 * 12 + 12].max(-1).values
    assert middle.tolist() == pytest.approx([1 - leak] * 9, abs=0.06 * leak)
    layer, x = make((16, 16, 3, 1, (14, 14), False), locality=locality)
    for mode in (layer.train(), layer.eval()):  # a soft position is no convolution, gate closed or not
        assert 0.8 * leak < relative(mode(x), plain(layer, x)) < 1.5 * leak


@pytest.mark.parametrize(("gate_init", "content"), [(1, 0.269), (4, 1.8e-2), (10, 4.5e-5)])
def test_sigmoid_gate_starts_off_the_convolution(gate_init, content):
    layer, x = make((16, 16, 3, 1, (14, 14), False), gate="sigmoid", gate_init=gate_init)
    assert layer.statistics() == pytest.approx({"gate": 1 - content, "content_share": content}, rel=0.02)
    assert 0.5 * content < relative(layer(x), plain(layer, x)) < 2 * content


def test_bfloat16_autocast_follows_float32():
    layer, x = make((32, 48, 3, 1, (8, 8), True), dtype=torch.float32, opened=True)
    with torch.no_grad():
        layer.query.div_(25)  # scores that bfloat16 resolves
    x.requires_grad_()
    grads = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        y.float().square().mean().backward()
        grads[enabled] = [p.grad.clone() for p in (x, *layer.parameters())]
        layer.zero_grad()
        x.grad = None
    for low, exact in zip(grads[True], grads[False], strict=True):
        assert low.dtype == torch.float32
        assert (low - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_is_the_inputs(backend):
    layer, x = make(CASES[6], dtype=torch.float32, opened=True)
    layer.backend = backend
    last = x.contiguous(memory_format=torch.channels_last)
    found = layer(last)
    assert layer(x).is_contiguous()
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, layer(x))


# ------------------------------------------------------------------------------------- optimiser and state


def test_optimiser_does_not_notice_the_switch():
    """Moments stay, and the next step moves the kernel as that of a twin that stays a convolution."""
    switched = nn.Sequential(ReparamConv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)).double()
    twin = copy.deepcopy(switched)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (switched, twin)]
    x = torch.randn(5, 4, 7, 7, dtype=torch.float64)
    target = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    for step in range(3):
        for model, optimizer in zip((switched, twin), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
        layer = switched[0]
        torch.testing.assert_close(layer.weight, twin[0].weight, rtol=1e-10, atol=1e-12)
        if step == 1:  # one step after the switch: from here on the gate is open and they part
            assert optimizers[0].state[layer.gate]["step"] == 1
            break
        weight, moment = layer.weight, optimizers[0].state[layer.weight]["exp_avg"]
        layer.reparameterize()
        assert layer.weight is weight
        assert optimizers[0].state[layer.weight]["exp_avg"] is moment
        assert [p.shape for p in layer.new_parameters()] == [(72, 4), (72, 4), (9,)]
        optimizers[0].add_param_group({"params": layer.new_parameters()})


def test_keys_of_a_convolution_are_a_convolutions():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer = ReparamConv2d.from_conv(conv)
    assert layer.state_dict().keys() == conv.state_dict().keys()
    assert (layer.weight, layer.bias) == (conv.weight, conv.bias)
    assert layer.new_parameters() == []
    assert not layer.is_attention


@pytest.mark.parametrize(("gate", "locality", "head_dim"), [("linear", math.inf, 5), ("sigmoid", 8.5, None)])
def test_state_dict_rebuilds_the_form(gate, locality, head_dim):
    layer, x = make(CASES[0], gate=gate, locality=locality, head_dim=head_dim, opened=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = nn.Sequential(ReparamConv2d(5, 7, 3, padding=1, dtype=torch.float64))
    state = {f"0.{key}": value for key, value in torch.load(file, weights_only=True).items()}
    fresh.load_state_dict(state)
    assert (fresh[0].gate_kind, fresh[0].locality) == (gate, locality)
    assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match="query"):
        fresh.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias})


def test_copies_and_pickles_are_equal():
    layer, x = make(CASES[1], gate="sigmoid", locality=3.0, opened=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.weight is not layer.weight


def test_an_average_of_weights_keeps_gate_and_locality():
    layer, x = make(CASES[0], locality=8.4, dtype=torch.float32)
    exact, _ = make(CASES[0], dtype=torch.float32)
    for one in (layer, exact):
        average = timm.utils.ModelEmaV3(one, decay=0.9)
        average.update(one)
        kept = ReparamConv2d(5, 7, 3, padding=1)
        kept.load_state_dict(average.module.state_dict())
        assert kept.locality == pytest.approx(one.locality)
        torch.testing.assert_close(kept(x), one(x))


# --------------------------------------------------------------------------------------- what it looks at


@pytest.mark.parametrize("locality", [math.inf, 1.5])
@pytest.mark.parametrize("case", CASES[:3])
def test_maps_are_what_the_forward_multiplies_with(case, locality):
    layer, x = make(case, locality=locality, opened=True)
    maps = layer.attention_maps(x)
    taps = layer.weight.flatten(2).permute(2, 1, 0)
    y = torch.einsum("bhqk,bkc,hcd->bqd", maps, x.flatten(2).mT, taps)
    y = y if layer.bias is None else y + layer.bias
    torch.testing.assert_close(y.mT.reshape(layer(x).shape), layer(x))
    assert (maps.sum(-1) < 1 + 1e-9).all()


def test_distance_of_a_convolution_is_that_of_its_taps():
    taps = [2**0.5, 1, 2**0.5, 1, 0, 1, 2**0.5, 1, 2**0.5]
    layer = ReparamConv2d(4, 4, 3, 2, 1)
    x = torch.randn(2, 4, 6, 5)
    assert layer.attention_distance(x).tolist() == pytest.approx(taps)
    assert layer.reparameterize().attention_distance(x).tolist() == pytest.approx(taps)
    assert layer.statistics(x)["attention_distance"] == pytest.approx(sum(taps) / 9)


def test_distance_of_uniform_attention_is_that_of_the_grid():
    layer, x = make((4, 4, 3, 1, (5, 3), False))
    with torch.no_grad():
        layer.gate.fill_(1)
        layer.query.zero_()
    places = list(itertools.product(range(5), range(3)))
    expected = sum(math.dist(a, b) for a in places for b in places) / 15**2
    assert layer.attention_distance(x).tolist() == pytest.approx([expected] * 9)
    assert layer.statistics(x) == pytest.approx(
        {"gate": 1, "content_share": 1, "attention_distance": expected}
    )


def test_statistics_of_a_network_leave_it_as_it_was():
    model = nn.Sequential(ReparamConv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), ReparamConv2d(4, 4, 5, 2, 2))
    model[2].reparameterize(gate_init=0.5)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    found = attention_statistics(model, torch.randn(2, 3, 8, 8))
    assert found["0"] == pytest.approx({"gate": 0, "content_share": 0, "attention_distance": 1.073}, abs=1e-3)
    assert found["2"]["gate"] == 0.5
    assert found["2"]["attention_distance"] > 1.5
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


def test_queries_and_keys_start_small():
    layer = ReparamConv2d(64, 64, 3, padding=1).reparameterize()
    for weight in (layer.query, layer.key):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


# ------------------------------------------------------------------------------------------------- recast


def random_statistics(model):
    """Batch norms as after training: timm starts some at zero, which would hide what lies before them."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for value in (m.weight.data, m.running_var):
                value.uniform_(0.5, 1.5)
            for value in (m.bias.data, m.running_mean):
                value.normal_(std=0.1)
    return model


def test_recast_resnet50_keeps_logits():
    model = random_statistics(timm.create_model("resnet50")).eval()
    images = torch.randn(2, 3, 96, 96)
    attentive = recast(model, ["layer3.*", "layer4.*"])
    layers = reparam_layers(attentive)
    assert list(layers) == [f"layer{s}.{i}.conv2" for s, n in ((3, 6), (4, 3)) for i in range(n)]
    assert all(layer.is_attention for layer in layers.values())
    with torch.no_grad():
        expected = model(images)
        assert relative(attentive(images), expected) <= 1e-4
        for layer in layers.values():  # the whole of the attention, as in training
            layer.train()
        found = attentive(images)
        assert 0 < relative(found, expected) <= 1e-4
    assert all(type(m) is not ReparamConv2d for m in model.modules())
    kept = attentive.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("layer4.*.conv2", ["layer4.0.conv2", "layer4.1.conv2"]),
        ("layer4", ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]),
        ("layer4.1", ["layer4.1.conv1", "layer4.1.conv2"]),
        (["layer4.1.conv1", "layer3.0.conv?"], ["layer3.0.conv1", "layer3.0.conv2", "layer4.1.conv1"]),
    ],
)
def test_patterns(patterns, expected):
    model = timm.create_model("resnet18")
    assert make_reparameterizable(model, patterns) == expected
    assert list(reparam_layers(model)) == expected


def test_options_reach_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    layer = recast(model, "0", gate="sigmoid", locality=6.0, head_dim=3, gate_init=2.0)[0]
    assert (layer.gate_kind, layer.locality, layer.query.shape) == ("sigmoid", 6.0, (27, 3))
    assert layer.gate.tolist() == [2.0] * 9
    first, second = (recast(model, "*", generator=torch.Generator().manual_seed(3))[0].query for _ in "ab")
    assert torch.equal(first, second)


def test_a_convolution_in_two_places_stays_one():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = recast(nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)}), ["a", "b"])
    assert model["a"] is model["b"][0]
    assert model["a"].is_attention


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4, "padding": 2}, "kernel is 4×4"),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, "kernel is 3×5"),
        ({"kernel_size": 3, "padding": 0}, "padding is \\(0, 0\\)"),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, "dilation is \\(2, 2\\)"),
        ({"kernel_size": 3, "padding": 1, "groups": 4}, "4 groups"),
        ({"kernel_size": 3, "padding": 1, "stride": 3}, "stride is \\(3, 3\\)"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "reflect"),
    ],
)
def test_refused_convolutions(options, message):
    with pytest.raises(FourierBiasError, match=f"convolution 8 -> 8 .*{message}"):
        ReparamConv2d(8, 8, **options)
    with pytest.raises(FourierBiasError, match=f"^0, .*{message}"):
        recast(nn.Sequential(nn.Conv2d(8, 8, **options)), "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "soft"}, "no gate called 'soft'; use linear or sigmoid"),
        ({"locality": 0}, "locality is 0"),
        ({"locality": math.nan}, "locality is nan"),
        ({"head_dim": 0}, "head_dim is 0"),
    ],
)
def test_refused_options(options, message):
    layer = ReparamConv2d(4, 4, 3, padding=1)
    with pytest.raises(FourierBiasError, match=message):
        layer.reparameterize(**options)
    assert not layer.is_attention


def test_only_once():
    layer, _ = make(CASES[0])
    with pytest.raises(FourierBiasError, match="attention already"):
        layer.reparameterize()


def test_patterns_that_name_nothing_offer_what_would():
    model = timm.create_model("resnet50")
    with pytest.raises(
        FourierBiasError, match=r"'layer5\.\*' names no .* conv1, layer1\.0\.conv2, .*17 in all"
    ):
        recast(model, "layer5.*")
    with pytest.raises(FourierBiasError, match="names no"):  # 1×1, and left by patterns
        recast(model, "layer4.*.conv1")
    with pytest.raises(FourierBiasError, match="this network has none"):
        recast(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8)), "*")


def test_convolutions_that_compute_something_else_are_left():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.Conv2d(4, 4, 3, padding=1)
    hooked.register_forward_hook(lambda m, args, y: 2 * y)
    model = nn.Sequential(Scaled(4, 4, 3, padding=1), hooked, nn.Conv2d(4, 4, 3, padding=1))
    assert make_reparameterizable(model, "*") == ["2"]
    for name, reason in (("0", "it is a Scaled"), ("1", "it has hooks")):
        with pytest.raises(FourierBiasError, match=reason):
            recast(model, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_estimated_before_it_is_taken(backend):
    layer = ReparamConv2d(2, 2, 3, padding=1).reparameterize(memory_limit=2**30)
    layer.backend = backend
    x = torch.zeros(1, 1, 1, 1).expand(8, 2, 160, 160)  # maps of 22 GiB for one sample
    with pytest.raises(FourierBiasError, match=r"2 -> 2 on a 160×160 grid, batch 8, .* GiB.*limit of 1 GiB"):
        layer(x)
    assert layer.eval()(x).shape == x.shape  # the gate is closed: a convolution
    with pytest.raises(FourierBiasError, match="raise memory_limit"):
        layer.attention_maps(x)
    assert layer.attention_memory((8, 2, 160, 160), chunked=False) > 8 * 9 * 160**4 * 4


def test_a_convolution_has_no_maps():
    with pytest.raises(FourierBiasError, match="a convolution still"):
        ReparamConv2d(2, 2, 3, padding=1).attention_maps(torch.zeros(1, 2, 4, 4))
