"""What preparation leaves for the map and for attention, in blocks of BlockShape.q and BlockShape.k tokens.

Shapes: B batches, H and Hkv heads, D head_dim; q_blocks and k_blocks blocks; q_places = q_blocks · BLOCK_Q and
k_places = k_blocks · BLOCK_K tokens in blocking order, the last of which may not exist; pitch, see `row_pitch`.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..formats import INT8_LIMIT, INT8_MAX
from .launch import Region


@dataclass(frozen=True)
class SampledStatistics:
    """Sums and ranges of a sample of K and V, in `SPLITS` shares, from which `prepare_keys` finds their constants.

    partial: float32 (B, Hkv, SPLITS, 4, padded D): the sum of K, the sum, the maximum and the minimum of V.
    sampled: int32 (B, Hkv, SPLITS), tokens of each share that exist.
    """

    partial: Region
    sampled: Region

    def key_centre(self, dim: int) -> Tensor:
        """The constant of K, float32 (B, Hkv, D)."""
        sums, count = self.partial.tensor()[:, :, :, 0, :dim].sum(2), self.sampled.tensor().sum(2)
        return sums / count.clamp(min=1)[..., None]


@dataclass(frozen=True)
class PreparedQueries:
    """Q in INT8, and what stands for each of its blocks.

    quantised: int8 (B, H, q_places, pitch), zero past D; channels as `mixed` leaves them.
    scale: float32 (B, H, q_places), what a row is multiplied by, with the softmax scale and log2 e folded in.
    mean: float32 (B, H, q_blocks, D), in the units of q.
    similarity: float32 (B, H, q_blocks), mean cosine of a block, 1 where no threshold asks for it; `FORCED` where it
        holds a dense query; NaN where it holds a number that is not finite.
    """

    quantised: Region
    scale: Region
    mean: Region
    similarity: Region


@dataclass(frozen=True)
class PreparedKeys:
    """K less a constant by channel in INT8, and what stands for each of its blocks.

    quantised: int8 (B, Hkv, k_places, pitch), zero past D and where there is no key; channels as of the queries.
    scale: float32 (B, Hkv, k_blocks), what the numbers of a block are multiplied by.
    mean: float32 (B, Hkv, k_blocks, D), over the keys that exist, in the units of k.
    similarity: float32 (B, Hkv, k_blocks), as of queries; `FORCED` where the block holds a sink.
    count: int32 (B, Hkv, k_blocks), keys of the block that exist.
    valid: int8 (B, Hkv, k_places), whether the key exists; None without padding, and beside a bias.
    pooled: int8 (B, Hkv, k_blocks, pitch), `mean` for the pooled tail; None, as the next, where skipped blocks are
        dropped.
    pooled_terms: int32 (B, Hkv, 32 · skip_words(k_blocks)), for each pooled key a word that, read as float32, is what
        its numbers are multiplied by, and whose lower half, read as float16, is what is added to its scores in log2
        units, for the number of keys that it stands for and their mean bias.
    bias: float32 (B, Hkv, k_places), added to the scores of a key in log2 units, -inf where there is none; None, as the
        next two, without a bias.
    mean_bias: float32 (B, Hkv, k_blocks), its mean over the keys that exist.
    biased: int8 (B, Hkv, k_blocks), whether it is anything but zero.
    """

    quantised: Region
    scale: Region
    mean: Region
    similarity: Region
    count: Region
    valid: Region | None
    pooled: Region | None
    pooled_terms: Region | None
    bias: Region | None = None
    mean_bias: Region | None = None
    biased: Region | None = None


@dataclass(frozen=True)
class PreparedValues:
    """V less a constant by channel, over a scale by channel and one by block.

    values: float16 (B, Hkv, k_places, pitch), or int8 (B, Hkv, D, k_places) with the keys permuted, see `AttendConfig`;
        v = values · block_scale · scale + centre.
    scale, centre: float32 (B, Hkv, D).
    block_scale: float32 (B, Hkv, k_blocks). Beside float16 a power of two, 1 unless the block holds values far beyond
        the sampled ones. NaN where the block holds a number that is not finite.
    channel_scale: float32 (B, Hkv, k_blocks, D), which takes the place of block_scale where that is above
        `plain_scale`, and is not written elsewhere; None beside float16.
    pooled: bfloat16, see `pooled_dtype`, (B, Hkv, k_blocks, pitch), means of (v - centre) / scale over the keys that
        exist; None where skipped blocks are dropped.
    """

    values: Region
    scale: Region
    centre: Region
    block_scale: Region
    channel_scale: Region | None
    pooled: Region | None

    @property
    def plain_scale(self) -> float:
        """The largest scale of a block that attention's plain loop takes."""
        return 1.0 if self.channel_scale is None else INT8_LIMIT / INT8_MAX
