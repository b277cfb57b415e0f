"""LSRA for vision: a constant half of the channels attends, the other half convolves."""

import pytest
import timm
import torch

from fourierbias.errors import FourierBiasError
from fourierbias.models.lsra import LSRA
from fourierbias.probes import Recorder, choose_probes


def shape_of(layer, maps):
    return tuple(maps.shape)


def test_reference_size_and_shares():
    model = timm.create_model("lsra")
    assert sum(p.numel() for p in model.parameters()) == 885_034
    assert [(b.attention_width, b.conv_width) for b in model.blocks] == [(63, 63)] * 6
    assert model.patch_embed.grid_size == (8, 8)
    assert model.pos_embed.shape == (1, 65, 126)


def test_attention_half_comes_first_and_the_other_half_sees_its_neighbours_only():
    block = timm.create_model("lsra").double().eval().blocks[0]
    tokens = torch.randn(1, 65, 126, dtype=torch.float64)
    changed = tokens.clone()
    changed[0, 1 + 8 * 4 + 4] += torch.randn(126, dtype=torch.float64)  # the patch at row 4, column 4
    with torch.no_grad():
        moved = (block.mix(changed) - block.mix(tokens))[0]
    attended, convolved = moved[:, :63].abs().amax(1) > 0, moved[:, 63:].abs().amax(1) > 0
    assert attended.all()
    near = {1 + 8 * row + column for row in (3, 4, 5) for column in (3, 4, 5)}
    assert set(convolved.nonzero().flatten().tolist()) == near


def test_halves_do_not_mix_before_the_mlp():
    block = timm.create_model("lsra").double().eval().blocks[0]
    tokens = torch.randn(1, 65, 126, dtype=torch.float64)
    changed = tokens.clone()
    changed[..., 63:] += 1
    with torch.no_grad():
        assert torch.equal(block.mix(changed)[..., :63], block.mix(tokens)[..., :63])


def test_captured_in_blocks_and_sublayers_with_kinds():
    model = timm.create_model("lsra")
    blocks, sublayers = choose_probes(model, "blocks"), choose_probes(model, "sublayers")
    assert {p.kind for p in blocks} == {"split"}
    assert [p.kind for p in sublayers] == ["split", "mlp"] * 6
    with torch.no_grad(), Recorder(model, blocks + sublayers, shape_of, input_size=(32, 32)) as recorder:
        shapes = recorder.forward(torch.rand(2, 3, 32, 32))
    assert set(shapes.values()) == {(2, 126, 8, 8)}
    assert len(shapes) == 18


@pytest.mark.parametrize(("width", "heads"), [(127, 9), (120, 9), (126, 4)])
def test_halves_that_heads_cannot_share_are_refused(width, heads):
    with pytest.raises(FourierBiasError, match=f"choose a multiple of {2 * heads}"):
        timm.create_model("lsra", embed_dim=width, num_heads=heads)
    assert LSRA(img_size=32, patch_size=4, embed_dim=2 * heads, depth=1, num_heads=heads).blocks[0].conv_width
