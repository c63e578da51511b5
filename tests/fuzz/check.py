"""The checks that every random call has to pass."""
from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from comfyui_spargeattn.kernels import (
    BlockMap,
    BlockShape,
    SpargeParams,
    SpargeStats,
    attention_residual,
    block_sparse_attention,
    reference,
    sparge_attention,
)
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds
from comfyui_spargeattn.tests.assertions import assert_near
from comfyui_spargeattn.tests.fuzz.draw import Call, Limits, draw
from comfyui_spargeattn.tests.kernels import eager
from comfyui_spargeattn.tests.kernels._triton.harness import (
    DEVICE,
    DTYPES,
    ON_GPU,
    PV_FORMATS,
    check_output,
    faster_interpreter,
    hidden_keys,
    poisoned_memory,
    recorded_maps,
    sampled_mean,
)
from comfyui_spargeattn.tests.kernels.loops import BLOCK, all_heads

ON_THE_GPU = Limits(DEVICE, "triton", DTYPES, PV_FORMATS, tokens=2000, rarely=10_000, heads=3)
INTERPRETED = Limits(DEVICE, "triton", DTYPES, PV_FORMATS, tokens=100, rarely=150, heads=2,
                     dims=(1, 3, 16, 17, 24, 33, 40, 64, 64, 72, 128))
EAGER = Limits("cpu", "reference", (torch.float16, torch.bfloat16, torch.float32), ("auto",), tokens=300, rarely=700,
               heads=2, dims=(1, 3, 8, 17, 64))
TRITON = ON_THE_GPU if ON_GPU else INTERPRETED


@contextmanager
def small_kernels():
    """Without a GPU, make blocks and samples so small that a hundred tokens make an interesting call."""
    if ON_GPU:
        yield
        return
    from comfyui_spargeattn.kernels._triton import pipeline, sample
    from comfyui_spargeattn.kernels._triton.config import AttendConfig
    with ExitStack() as patches:
        for owner, name, value in ((sample, "SAMPLE", 64), (sample, "SPLITS", 2),
                                   (pipeline, "attend_config", lambda *key: AttendConfig(BlockShape(32, 16), 4, 2))):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(faster_interpreter())
        yield


def check(seed: int, limits: Limits) -> float:
    """The error of a call as a share of its limit. Raises AssertionError if the call is wrong."""
    if limits.impl == "reference":
        return check_reference(draw(seed, limits))
    with small_kernels():
        return check_kernels(draw(seed, limits))


def run(call: Call, **changes) -> tuple[Tensor, SpargeStats | None, Tensor | None]:
    """The output, the statistics and the log-sum-exp, each None unless asked for, of the public call."""
    arguments = call.arguments | changes
    if call.block_map is None:
        result = sparge_attention(call.q, call.k, call.v, params=call.params, **arguments)
    else:
        result = block_sparse_attention(call.q, call.k, call.v, call.block_map,
                                        pv_threshold=call.params.pv_threshold, **arguments)
    out, *more = result if isinstance(result, tuple) else (result,)
    assert len(more) == arguments["return_stats"] + arguments["return_lse"], "not what was asked for"
    assert out.shape == call.q.shape and out.dtype == call.q.dtype and out.is_contiguous(), "misshapen"
    return out, more[0] if arguments["return_stats"] else None, more[-1] if arguments["return_lse"] else None


def over_v(call: Call) -> Tensor:
    """The output, written over a copy of v where that can be, a group of heads at a time."""
    from comfyui_spargeattn.kernels._triton import memory
    memory_of_v = call.v.untyped_storage().clone()  # with the strides of v, whose alignment decides how sums round
    v = torch.empty(0, dtype=call.v.dtype, device=call.v.device)
    v.set_(memory_of_v, call.v.storage_offset(), call.v.shape, call.v.stride())
    with poisoned_memory(), mock.patch.object(memory, "SMALL", 0):
        result = sparge_attention(call.q, call.k, v, params=call.params, overwrite_v=True,
                                  **call.arguments | {"impl": "triton"})
    return result[0] if isinstance(result, tuple) else result


def check_kernels(call: Call) -> float:
    """Compare the kernels with the emulation of their arithmetic over the map that the reference predicts."""
    inputs = [x.clone() for x in (call.q, call.k, call.v)]
    with poisoned_memory(), recorded_maps() as maps:
        out, stats, lse = run(call, impl="triton")
    again, _, lse_again = run(call, impl="triton")
    assert same(out, again), "another result the second time"
    assert lse is None or same(lse, lse_again), "another log-sum-exp the second time"
    assert all(same(x, y) for x, y in zip(inputs, (call.q, call.k, call.v))), "an input was written to"
    if call.block_map is None:
        assert same(out, over_v(call)), "another result over v"
    q, k, v, out = (as_bhnd(call, x) for x in (call.q, call.k, call.v, out))
    arguments = plain_arguments(call)
    if not call.finite:
        check_not_finite(q, k, v, out, arguments, call.block_map, maps[0].block)
        return 0.0
    from comfyui_spargeattn.kernels._triton import sample
    loose = k.shape[2] > sample.SAMPLE
    few = 4 / math.sqrt(out.numel())  # so few numbers that one rounding is much of their error
    # INT8 rounds P by the last bits of maxima, which degenerate inputs may leave alike in many rows. In 16 bits, few
    # keys weigh there, and sums in float16 lose as much as the output's own rounding.
    alike = 1.0 if call.plain else 1.5 if call.arguments["pv_dtype"] == "fp16" else 3.0
    if lse is not None:
        check_lse(q, k, v, lse, maps[0], call.params, arguments)
    if call.refreshes:
        check_refresh(call, "triton")
    mask = call.block_map.mask() if isinstance(call.block_map, BlockMap) else call.block_map
    return check_output(q, k, v, out, stats, maps[0], params=call.params, block_mask=mask,
                        rms_slack=alike * (1.5 if loose else 1.1) + few,
                        max_slack=alike * (3 if loose else 2) + 2 * few, ties=1 if call.plain else 8,
                        pv_dtype=call.arguments["pv_dtype"], **arguments).ratio


def check_reference(call: Call) -> float:
    """Compare the public call with the reference on contiguous tensors, and the latter with plain loops."""
    out, stats, _ = run(call, impl="reference")
    assert same(out, run(call, impl="reference")[0]), "another result the second time"
    q, k, v, out = (as_bhnd(call, x).contiguous() for x in (call.q, call.k, call.v, out))
    arguments = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in plain_arguments(call).items()}
    if not call.finite:
        check_not_finite(q, k, v, out, arguments, call.block_map, reference.BLOCK)
        return 0.0
    mask = call.block_map.mask() if isinstance(call.block_map, BlockMap) else call.block_map
    expected, _, expected_stats = eager.sparge_attention(q, k, v, params=call.params, block_mask=mask, **arguments)
    scale_of_v = v.float().nan_to_num(0.0, 0.0, 0.0).abs().max()
    error = (out.double() - expected.double()).abs().max().item()
    allowed = 1e-5 * scale_of_v.item() + 1e-30
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g} against tidy tensors"
    if stats is not None:
        assert_near(stats.kept, expected_stats.kept, atol=1e-6, what="kept")
    if call.refreshes:
        check_refresh(call, "reference")
    if call.plain and call.block_map is None and "key_bias" not in arguments:
        check_loops(q, k, v, call.params, arguments)
    return error / allowed


def check_lse(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, found: BlockMap, params: SpargeParams,
              arguments: dict) -> None:
    """Hold the log-sum-exp of finite tensors against float64 over the same map: no score may be further off than INT8
    moves one at most, and float32."""
    q, k, v = q.double(), k.double(), v.double()
    hidden = hidden_keys(arguments)
    if hidden is not None:
        k, v = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (k, v))
    with mock.patch.object(reference, "predict_map", lambda *args: found.mask()):
        spec = CallSpec(Thresholds.of(params, q.device), **arguments)
        expected = reference.with_lse(q, k, v, spec, found.block)[1]
    assert torch.equal(lse == -math.inf, expected == -math.inf), "a row without keys, or not"
    group, dim = q.shape[1] // k.shape[1], q.shape[-1]
    centre = sampled_mean(k, hidden).repeat_interleave(group, 1)
    k = k.repeat_interleave(group, 1)
    apart = k - centre if hidden is None else (k - centre).masked_fill(hidden[:, None, :, None], 0.0)
    scale = abs(spec.scale_for(dim))
    step_q, step_k = q.abs().amax(-1) / 127, apart.abs().amax((2, 3))[..., None] / 127
    longest_k = apart.abs().sum(-1).amax(-1, keepdim=True)
    allowed = (step_q * longest_k + step_k * q.abs().sum(-1) + step_q * step_k * dim) * scale / 2
    largest = q.norm(dim=-1) * apart.norm(dim=-1).amax(-1, keepdim=True) * scale
    if spec.pooled:  # its keys are in INT8, and their weights in float16
        allowed += largest / 256 + 0.01
    bias = arguments["key_bias"].double().clamp(min=-1e4).abs().max().item() if "key_bias" in arguments else 0.0
    allowed += (largest + (q.abs() @ centre.abs().mT)[..., 0] * scale + expected.abs() + bias) * 1e-5 + 1e-4
    seen = expected > -math.inf
    assert_near(lse[seen], expected[seen], atol=allowed[seen], what="log-sum-exp")


def check_refresh(call: Call, impl: str) -> None:
    """A residual made of any dense result has to give it back when it is added."""
    arguments = {name: x for name, x in call.arguments.items() if name not in ("return_stats", "return_lse")}
    every = SpargeParams(cdf_threshold=1.0)
    dense = sparge_attention(call.q, call.k, call.v, params=every, impl=impl, **arguments | dict(skipped="drop"))
    with poisoned_memory():
        made = attention_residual(call.q, call.k, call.v, dense, params=call.params, impl=impl, **arguments)
    out = as_bhnd(call, sparge_attention(call.q, call.k, call.v, params=call.params, impl=impl, residual=made,
                                         **arguments))
    dense, limits = as_bhnd(call, dense), torch.finfo(out.dtype)
    rounding = dense.abs().double() * limits.eps + limits.smallest_normal
    assert_near(out, dense, atol=0.51 * made.scale.double()[..., None] + rounding, what="with residual")


def check_loops(q: Tensor, k: Tensor, v: Tensor, params: SpargeParams, arguments: dict) -> None:
    """The first tokens of a call, in float64 and small blocks."""
    q_tokens, k_tokens = min(q.shape[2], 70), min(k.shape[2], 70)
    if "order" in arguments:
        q_tokens = k_tokens = min(q_tokens, k_tokens)
        order = arguments["order"]
        kept = order[order < k_tokens] if order.ndim == 1 else torch.stack([row[row < k_tokens] for row in order])
        arguments = arguments | dict(order=kept)
    arguments = arguments | {name: [(a, b) for a, b in arguments[name] if b <= n]
                             for name, n in (("sink_keys", k_tokens), ("dense_queries", q_tokens)) if name in arguments}
    if "key_padding_mask" in arguments:
        arguments = arguments | dict(key_padding_mask=arguments["key_padding_mask"][:, :k_tokens])
    q, k, v = q[:, :, :q_tokens].double(), k[:, :, :k_tokens].double(), v[:, :, :k_tokens].double()
    found, block_map, stats = eager.sparge_attention(q, k, v, params=params, block=BLOCK, **arguments)
    named = {"padding" if name == "key_padding_mask" else name: value for name, value in arguments.items()}
    expected, mask, kept, skipped = all_heads(q, k, v, params, **named)
    assert torch.equal(block_map.mask(), mask), "another map than the loops'"
    assert_near(found, expected, atol=1e-9, what="against loops")
    assert_near(stats.kept, kept, atol=1e-6, what="kept")
    assert_near(stats.pv_skipped, skipped, atol=1e-6, what="pv_skipped")


def check_not_finite(q: Tensor, k: Tensor, v: Tensor, out: Tensor, arguments: dict,
                     block_map: BlockMap | Tensor | None, block: BlockShape) -> None:
    """Assert that the output is not finite wherever dense attention, over the blocks of a map if given, is not."""
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    visible = visible.tril() if arguments["causal"] else visible
    padding = hidden_keys(arguments)
    visible = visible if padding is None else visible & ~padding[:, None, None]
    if block_map is not None:
        visible = visible & given_tokens(block_map, block, arguments.get("order"), q, k)
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if arguments["scale"] is None else arguments["scale"])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1).where(visible, 0.0)
    broken = visible.double() @ (~v.isfinite()).double() > 0
    dense = (weights @ v.where(v.isfinite(), 0.0)).masked_fill(broken, math.nan)
    hidden = ~dense.isfinite() & out.isfinite()
    assert not bool(hidden.any()), f"finite: {hidden.sum().item()} numbers that dense attention makes NaN, " \
                                   f"the first at {hidden.nonzero()[0].tolist()}"


def given_tokens(block_map: BlockMap | Tensor, block: BlockShape, order: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """bool (B or 1, H, Nq, Nk), which keys a map of blocks lets each query attend."""
    mask = block_map.mask() if isinstance(block_map, BlockMap) else block_map
    mask = mask.expand(-1, q.shape[1], -1, -1)
    mask = mask.repeat_interleave(block.q, 2)[:, :, :q.shape[2]].repeat_interleave(block.k, 3)[..., :k.shape[2]]
    if order is None:
        return mask
    place = order.argsort(-1).expand(k.shape[1], -1).repeat_interleave(q.shape[1] // k.shape[1], 0)
    heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
    return mask[:, heads, place[:, :, None], place[:, None, :]]


def plain_arguments(call: Call) -> dict:
    """The arguments that the reference takes besides q, k, v and the thresholds."""
    others = ("layout", "return_stats", "return_lse", "pv_dtype")
    return {name: value for name, value in call.arguments.items() if name not in others}


def as_bhnd(call: Call, x: Tensor) -> Tensor:
    return x if call.arguments["layout"] == "BHND" else x.transpose(1, 2)


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, NaN with NaN."""
    return torch.equal(x.nan_to_num(nan=12345.0), y.nan_to_num(nan=12345.0)) and torch.equal(x.isnan(), y.isnan())
