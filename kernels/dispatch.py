"""From a checked call to an implementation: directly in eager mode, as a torch library op under torch.compile."""
from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from . import reference
from .capability import select_implementation
from .failures import FastPathError, raise_failed, remember
from .types import BlockMap, BlockShape, SpargeParams, TokenRanges

_NAMESPACE = "comfyui_spargeattn"
_Result = TypeVar("_Result")
_SCHEMA = """attention(Tensor q, Tensor k, Tensor v, *, Tensor? per_head, Tensor? key_padding_mask, Tensor? key_bias,
    Tensor? order, float[] thresholds, float? scale, int[] sink_keys, int[] dense_queries, bool causal,
    bool return_stats, str selection, str layout, str pv_dtype, str skipped, str impl, Tensor? block_mask=None,
    int[] block=[]) -> (Tensor, Tensor, Tensor)"""


def run(q: Tensor, k: Tensor, v: Tensor, *, params: SpargeParams, sink_keys: TokenRanges | None,
        dense_queries: TokenRanges | None, **call) -> tuple[Tensor, Tensor, Tensor]:
    """(output, kept, pv_skipped) of a checked `sparge_attention` call; the last two are empty without return_stats."""
    q, k, v = (x.detach() if x.requires_grad else x for x in (q, k, v))
    attention = torch.ops.comfyui_spargeattn.attention if torch.compiler.is_compiling() else _attention
    return attention(q, k, v, thresholds=_plain(params), per_head=pack_thresholds(params, q.device),
                     selection=params.selection, sink_keys=_flat(sink_keys), dense_queries=_flat(dense_queries), **call)


def run_map(q: Tensor, k: Tensor, *, params: SpargeParams, layout: str, pv_dtype: str, impl: str,
            **call) -> BlockMap:
    """The block map of a checked `block_map` call."""
    q, k = (_heads_first(x.detach(), layout) for x in (q, k))

    def fast() -> BlockMap:
        return _pipeline().predict(q, k, per_head=pack_thresholds(params, q.device), thresholds=_plain(params),
                                   selection=params.selection, pv_dtype=pv_dtype, **call)

    return _on_an_implementation(impl, q, fast,
                                 lambda: reference.sparge_attention(q, k, k, params=params, **call)[1])


def block_of(q: Tensor, pv_dtype: str, impl: str) -> BlockShape:
    """The block shape of the implementation that a call with q (…, D) gets."""
    return _on_an_implementation(impl, q, lambda: _pipeline().block_of(q, pv_dtype), lambda: reference.BLOCK)


def choose(impl: str, q: Tensor) -> str:
    """The implementation a call gets. Raises RuntimeError where the one asked for by name can't take it."""
    name, reason = select_implementation(q)
    if impl == "triton" and name != "triton":
        raise RuntimeError(f"impl='triton' can't take this call: {reason}")
    return name if impl == "auto" else impl


def _on_an_implementation(impl: str, q: Tensor, fast: Callable[[], _Result], eager: Callable[[], _Result]) -> _Result:
    """What the implementation that a call gets returns. With "auto", kernels that fail leave the call to the other."""
    if choose(impl, q) == "reference":
        return eager()
    try:
        return fast()
    except FastPathError as error:
        remember(q, error)
        if impl == "triton":
            raise
    return eager()


def _pipeline():
    """The module of the fast kernels; importing it imports Triton, which may be broken in any way."""
    try:
        from ._triton import pipeline
    except Exception as error:
        raise_failed("importing Triton", error)
    return pipeline


def pack_thresholds(params: SpargeParams, device: torch.device) -> Tensor | None:
    """float32 (3, H): amount, similarity, pv per head; None where all thresholds are plain numbers."""
    if params.heads is None:
        return None
    rows = (params.amount, params.similarity_threshold, params.pv_threshold)
    return torch.stack([x.to(device, torch.float32) if isinstance(x, Tensor)
                        else torch.full((params.heads,), x, device=device) for x in rows])


def _attention(q: Tensor, k: Tensor, v: Tensor, per_head: Tensor | None, key_padding_mask: Tensor | None,
               key_bias: Tensor | None, order: Tensor | None, thresholds: list[float], scale: float | None,
               sink_keys: list[int], dense_queries: list[int], causal: bool, return_stats: bool, selection: str,
               layout: str, pv_dtype: str, skipped: str, impl: str, block_mask: Tensor | None = None,
               block: list[int] | tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v, target = (_heads_first(x, layout) for x in (q, k, v, out))
    sink_keys, dense_queries = _pairs(sink_keys), _pairs(dense_queries)
    call = dict(scale=scale, causal=causal, key_padding_mask=key_padding_mask, key_bias=key_bias, order=order,
                sink_keys=sink_keys, dense_queries=dense_queries, skipped=skipped, block_mask=block_mask)
    if block_mask is not None:
        impl = choose(impl, q)  # whose blocks the map is made of
        _check_blocks(block_mask, block, block_of(q, pv_dtype, impl), q.shape[2], k.shape[2])

    def fast() -> tuple[Tensor | None, Tensor | None]:
        return _pipeline().attention(q, k, v, target, per_head=per_head, thresholds=thresholds, selection=selection,
                                     pv_dtype=pv_dtype, return_stats=return_stats, **call)

    def eager() -> tuple[Tensor | None, Tensor | None]:
        result, _, stats = reference.sparge_attention(
            q, k, v, params=_unpack_thresholds(selection, thresholds, per_head),
            quantise=None if pv_dtype == "auto" else pv_dtype, **call)
        target.copy_(result)
        return (stats.kept, stats.pv_skipped) if return_stats else (None, None)

    kept, pv_skipped = _on_an_implementation(impl, q, fast, eager)
    if not return_stats:
        kept, pv_skipped = q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    return out, kept, pv_skipped


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *, return_stats: bool, layout: str,
                    **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[1 if layout == "BHND" else 2]
    shape = (q.shape[0], heads) if return_stats else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), *(
        q.new_empty(shape, dtype=torch.float32) for _ in range(2))


def _check_blocks(mask: Tensor, given: list[int] | tuple[int, ...], block: BlockShape, n_q: int, n_k: int) -> None:
    """Here rather than in `api`: under torch.compile the implementation is chosen when the op runs."""
    if given and BlockShape(*given) != block:
        raise ValueError(f"block_map must have this call's blocks, {block}; got {BlockShape(*given)}")
    if tuple(mask.shape[2:]) != block.counts(n_q, n_k):
        raise ValueError(f"block_map must have {block.counts(n_q, n_k)} blocks of {block} in its last dimensions; "
                         f"got shape {tuple(mask.shape)}")


def _unpack_thresholds(selection: str, thresholds: list[float], per_head: Tensor | None) -> SpargeParams:
    amount, similarity, pv = thresholds if per_head is None else per_head.unbind()
    amounts = {"cdf_threshold" if selection == "cdf" else "topk": amount}
    return SpargeParams(**amounts, similarity_threshold=similarity, pv_threshold=pv)


def _plain(params: SpargeParams) -> list[float]:
    """The thresholds as numbers; unused (zeros) where they are given per head, but for a λ test that is off."""
    if params.heads is not None:
        off = not isinstance(params.pv_threshold, Tensor) and params.pv_threshold == float("inf")
        return [0.0, 0.0, float("inf") if off else 0.0]
    return [float(params.amount), float(params.similarity_threshold), float(params.pv_threshold)]


def _heads_first(x: Tensor, layout: str) -> Tensor:
    return x if layout == "BHND" else x.transpose(1, 2)


def _flat(ranges: TokenRanges | None) -> list[int]:
    return [int(end) for pair in ranges or () for end in pair]


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2]))


def _register() -> torch.library.Library | None:
    """Define the op once a process: the package may be loaded by path and by name in the same one."""
    if hasattr(torch.ops.comfyui_spargeattn, "attention"):
        return None
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("attention", _attention, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::attention", _fake_attention, lib=library)
    return library


_library = _register()
