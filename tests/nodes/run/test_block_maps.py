"""Block maps that a run keeps for its report."""
import math

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams, block_map
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock
from comfyui_spargeattn.nodes.override import SLOT, SpargeOverride
from comfyui_spargeattn.nodes.run.block_maps import BlockPictures, MapRequest, shrink
from comfyui_spargeattn.tests.nodes.stand_ins import Patcher


def test_maps_come_from_few_calls_of_a_short_run():
    pictures = BlockPictures(steps=16)
    taken = []
    for index in range(16):
        if pictures.wants(2, TransformerBlock("", index)):
            pictures.add(TransformerBlock("", index), torch.ones(1, 2, 2, dtype=torch.bool))
            taken.append(index)
    assert taken == [0, 4, 8, 12]
    assert not pictures.wants(3, TransformerBlock("", 5))


@pytest.mark.parametrize("size", ((5, 7), (128, 128), (129, 300), (1, 1000)))
def test_shrunk_map_keeps_the_share(size):
    mask = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) < 0.4
    small = shrink(mask)
    assert small.dtype == torch.uint8 and max(small.shape[1:]) <= 128
    tall, wide = (math.ceil(n / 128) for n in size)
    for row, column in ((0, 0), (small.shape[1] - 1, small.shape[2] - 1)):
        pixel = mask[:, row * tall:(row + 1) * tall, column * wide:(column + 1) * wide]
        expected = pixel.float().mean((1, 2)) * 255
        assert (small[:, row, column] - expected).abs().max() <= 0.51


@pytest.mark.parametrize("layout", ("BNHD", "BHND"))
def test_kept_map_is_of_the_call_with_its_padding(layout):
    """Two samples with other padding: the map is the first one's."""
    params = SpargeParams(topk=0.25, similarity_threshold=-1.0)
    override = SpargeOverride(NodeSettings(params, start_percent=0.0, min_tokens=64))
    q, k = torch.randn(2, 2, 2, 512, 16, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 512, dtype=torch.bool)
    visible[0, 100:300] = False
    visible[1, 300:] = False
    patcher, options = Patcher(), {SLOT: override, "block_index": 0}
    override.run.map_request = MapRequest(1, TransformerBlock("", 0))
    override.on_pre_run(patcher)
    override.on_prepare_state(patcher, torch.ones(1), {"transformer_options": options})
    how = {"skip_reshape": True, "skip_output_reshape": True} if layout == "BHND" else {}
    given = [x if layout == "BHND" else x.transpose(1, 2).flatten(2) for x in (q, k, k)]
    override(None, *given, 2, visible[:, None, None], scale=0.3, transformer_options=options, **how)
    override.on_cleanup(patcher)
    kept = override.run.summary.maps.maps[TransformerBlock("", 0)].bool()

    def expected(padding):
        return block_map(q[:1], k[:1], params=params, scale=0.3, key_padding_mask=padding, impl="reference").mask()[0]

    assert torch.equal(kept, expected(~visible[:1])) and not torch.equal(kept, expected(None))
    assert not kept[:, :, 2:4].any()  # keys 128 to 255 are padding
