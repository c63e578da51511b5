"""Transformer blocks, as models number them and as users list them."""
import pytest

from comfyui_spargeattn.nodes.call.transformer_blocks import ListedBlocks, TransformerBlock


@pytest.mark.parametrize("text, inside, outside", (
    ("", "", "0 single:0"),
    ("0, 1, 47-49", "0 1 47 48 49 single:48", "2 46 50"),
    ("single:0-3,double:7", "single:0 single:3 double:7", "0 double:0 single:7 single:4"),
    (" 3 - 4 , Input : 2,", "3 4 input:2", "2 5"),
    ("0 1", "0 1", "2 10"),
    ("4 7", "4 7", "47 5"),
    ("1 2-3 0", "0 1 2 3", "12 30 20"),
    ("0，1、3；5;7\n9", "0 1 3 5 7 9", "2 4 6 8"),
    ("single:0 -2 double : 1", "single:2 double:1", "0 double:2"),
))
def test_block_lists(text, inside, outside):
    blocks = ListedBlocks.parse(text)
    assert bool(blocks) == bool(inside)
    for name in inside.split() + outside.split():
        kind, _, index = name.rpartition(":")
        assert (TransformerBlock(kind, int(index)) in blocks) == (name in inside.split()), name


@pytest.mark.parametrize("text", ("x", "3-1", "-1", "1.5", "0/1", "1-2-3", "single:"))
def test_bad_block_lists(text):
    with pytest.raises(ValueError, match=f"dense_blocks .*'{text}'"):
        ListedBlocks.parse(text)


def test_listed_blocks_that_a_model_lacks():
    listed = ListedBlocks.parse("0, 99, single:1, foo:3, 2-5, 8-9")
    present = {TransformerBlock("", 0), TransformerBlock("single", 1), TransformerBlock("double", 4)}
    assert str(listed.without(present)) == "99, foo:3, 8-9"
    assert not ListedBlocks().without({TransformerBlock("", 0)})


@pytest.mark.parametrize("options, expected", (
    ({"block_index": 3, "block_type": "double"}, TransformerBlock("double", 3)),
    ({"block_index": 3}, TransformerBlock("", 3)),
    ({"block": ("input", 4), "block_index": 1}, TransformerBlock("input", 4)),
    ({}, None),
))
def test_block_that_runs(options, expected):
    assert TransformerBlock.of(options) == expected
