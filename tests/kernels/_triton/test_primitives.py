"""How a head_dim lies in memory and in tiles."""
import pytest

from comfyui_spargeattn.kernels._triton.primitives import channel_tiles, row_pitch


@pytest.mark.parametrize("dim, tiles, pitch", [
    (1, (32, 0), 32), (40, (64, 0), 64), (64, (64, 0), 64), (65, (64, 32), 96), (96, (64, 32), 96), (97, (128, 0), 128),
    (128, (128, 0), 128), (129, (128, 32), 160), (160, (128, 32), 160), (161, (128, 64), 192), (192, (128, 64), 192),
    (193, (256, 0), 256), (256, (256, 0), 256)])
def test_two_tiles_where_they_hold_fewer_channels(dim, tiles, pitch):
    assert channel_tiles(dim) == tiles and row_pitch(dim) == pitch
