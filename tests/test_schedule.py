import pytest

from fourierbias.errors import FourierBiasError
from fourierbias.training.schedule import Schedule, stage_of

LAYERS = [f"layer{stage}.{block}.conv{i}" for stage in (3, 4) for block in (0, 1) for i in (1, 2)]


def times(text, layers=LAYERS, epochs=8, **options):
    return list(Schedule.parse(text, layers, epochs, **options).switch_epochs.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("conv", [None] * 8),
        ("attention", [0] * 8),
        ("uniform:3", [3] * 8),
        ("uniform:8", [8] * 8),  # to the end of training: never
        ("uniform:25%", [2] * 8),
        ("late-first", [7, 6, 5, 4, 3, 2, 1, 0]),
        ("early-first", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("late-first:1-8", [8, 7, 6, 5, 4, 3, 2, 1]),
        ("early-first:1-4.5", [1, 2, 2, 3, 3, 4, 4, 5]),
        ("late-first:0%-50%", [4, 3, 3, 2, 2, 1, 1, 0]),
        ("late-first:5-5", [5] * 8),
        ("layer4.*=2, layer3.0.conv1=0", [0, None, None, None, 2, 2, 2, 2]),
        ("layer*=6,layer4.*=50%", [6, 6, 6, 6, 4, 4, 4, 4]),
    ],
)
def test_presets(text, expected):
    assert times(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("late-first", [4] * 4 + [0] * 4), ("early-first:2-6", [2] * 4 + [6] * 4), ("uniform:1", [1] * 8)],
)
def test_by_stage(text, expected):
    assert times(text, by="stage") == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 40])
@pytest.mark.parametrize("epochs", [1, 2, 5, 30, 61])
def test_late_first_is_the_mirror_of_early_first_and_monotone(count, epochs):
    layers = [f"conv{i}" for i in range(count)]
    late, early = times("late-first", layers, epochs), times("early-first", layers, epochs)
    assert late == early[::-1]
    assert early == sorted(early)
    assert early[0] == 0
    assert early[-1] < epochs  # all are attention in the end
    last = min(epochs * (count - 1) / count, epochs - 1)
    exact = [last * i / max(1, count - 1) for i in range(count)]
    assert all(abs(epoch - e) <= 0.5 for epoch, e in zip(early, exact, strict=True))


@pytest.mark.parametrize("text", ["conv", "attention", "uniform:3", "late-first", "late-first:2-6", "*2=4"])
def test_what_is_switched_stays_switched(text):
    schedule = Schedule.parse(text, LAYERS, 8)
    before = set()
    for epoch in range(9):
        now = schedule.switched(epoch)
        assert now >= before
        assert now == {n for n, e in schedule.switch_epochs.items() if e is not None and e <= epoch}
        assert all(schedule(epoch, layer) == (layer in now) for layer in LAYERS)
        before = now


def test_table_has_every_layer_with_its_epochs():
    lines = Schedule.parse("late-first:0-150", ["a", "stage.b"], 200).table().splitlines()
    assert lines[0].startswith("schedule late-first:0-150")
    assert [line.split() for line in lines[1:]] == [
        ["a", "150", "50", "-" * 18 + "#" * 6],
        ["stage.b", "0", "200", "#" * 24],
    ]
    assert Schedule.parse("conv", ["a"], 5).table().splitlines()[1].split() == ["a", "5", "0", "-" * 24]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("layer12.0.conv1", "layer12"),
        ("stages.0.1.conv", "stages.0"),
        ("blocks.3", "blocks.3"),
        ("head", "head"),
    ],
)
def test_stage_of(name, stage):
    assert stage_of(name) == stage


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("late", "no schedule 'late'; use conv, attention, uniform:E, late-first"),
        ("uniform", "no schedule 'uniform'"),
        ("conv:3", "no schedule 'conv:3'"),
        ("uniform:9", "9 is past the end of training, which has 8 epochs"),
        ("uniform:101%", "past the end"),
        ("uniform:-1", "'-1' is no number of epochs; give 12 or 40%"),
        ("uniform:soon", "'soon' is no number"),
        ("late-first:3", "wants the first and the last switch"),
        ("late-first:0-9", "9 is past the end"),
        ("late-first:6-2", "ends before it begins"),
        ("layer5.*=2", r"names 'layer5.\*', which is no reparameterizable layer; nearest is layer"),
        ("features=2", "they are layer3.0.conv1 to layer4.1.conv2"),
        ("layer3.0.conv3=2", "nearest is layer3.0.conv"),
        ("layer3.0.conv1=2,layer4", "' ?layer4' has no epoch; write NAME=EPOCH"),
        ("layer3.0.conv1=", "'' is no number"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(FourierBiasError, match=message):
        Schedule.parse(text, LAYERS, 8)


def test_bad_use():
    with pytest.raises(FourierBiasError, match="no layer to switch; train prs"):
        Schedule.parse("late-first", [], 8)
    with pytest.raises(FourierBiasError, match="cannot schedule by 'block'; use layer or stage"):
        Schedule.parse("late-first", LAYERS, 8, by="block")
    with pytest.raises(FourierBiasError, match=r"no layer 'layer3\.0\.conv9'; nearest is layer3\.0"):
        Schedule.parse("late-first", LAYERS, 8)(0, "layer3.0.conv9")
    with pytest.raises(FourierBiasError, match="switches a after 9 epochs, training has 8; give 0 to 8"):
        Schedule({"a": 9}, 8, "own")
