"""A run in words, for the picture of a report and for its text."""
from __future__ import annotations

import math

import torch

from .blocks import Block
from .pictures import SPARSE, Panels
from .policy import Settings
from .run_summary import RunSummary

# What a user can do about calls that stay dense, by the start of the reason. The other reasons need nothing done.
_ADVICE = {
    "no fast kernel": "The fast kernels need Triton and an NVIDIA GPU from RTX 30 or A100 on, or an AMD GPU from RDNA3 "
                      "or CDNA3 on. Triton comes with torch on Linux; on Windows: pip install triton-windows.",
    "too many tokens for the CPU": "A GPU is needed for sequences of this length.",
    "fewer tokens than min_tokens": "Lower min_tokens, or make the picture or clip larger: short sequences gain "
                                    "little.",
    "outside start_percent": "Sampling outside start_percent … end_percent stays dense on purpose.",
    "listed in dense_blocks": "These blocks are listed in dense_blocks.",
    "tuned to stay dense": "Nothing can be skipped at the error tuned for: tune with larger l1, or disconnect params.",
    "pv_precision fp8": "Choose pv_precision auto.",
    "mask other than": "This model hides some pairs of tokens, which only dense attention can do.",
    "unsupported dtype": "Load the model in 16 bits.",
    "unsupported call": "This model calls attention in a way that is not known yet: please report it with this text.",
}


def failed_report(headline: str, *notes: str) -> Panels:
    return Panels(headline, notes, True, {}, (), None, "", ())


def run_report(summary: RunSummary | None, settings: Settings, block: Block | None, head: int, step: int) -> Panels:
    """block, head, step: of the block map; None and 0 for the first that was kept."""
    if summary is None or summary.steps == 0:
        return failed_report("This model has not been sampled yet",
                             "Connect the model to the sampler, and the sampler's output to this node.")
    dense = [(f"dense: {reason}" + (f" ({summary.details[reason]})" if reason in summary.details else ""), count)
             for reason, count in summary.dense.items()]
    calls = ([(SPARSE, summary.sparse)] if summary.sparse else []) + dense
    pixels, title = _block_map(summary, block, head, step)
    notes = _success(summary) if summary.sparse else [summary.problem or "the run ended early", *_advice(summary)]
    headline = "Nothing was accelerated in this run"
    if summary.sparse:
        headline = "The run was interrupted" if summary.sparsity is None else \
            f"{summary.sparsity:.1%} of the attention skipped"
    return Panels(headline, notes, not summary.sparse, summary.cells, calls, pixels, title,
                  _settings(settings, summary))


def _success(summary: RunSummary) -> list[str]:
    notes = []
    compared = [times for times in summary.times if times.dense is not None]
    if compared:
        sparse = sum(times.calls * times.sparse for times in compared) / 1000
        dense = sparse + summary.saved
        change = f"{dense / sparse:.2f} × faster" if sparse <= dense else f"{sparse / dense:.2f} × slower"
        notes.append(f"Sparse calls took {sparse:.3g} s in place of {dense:.3g} s: {change}. The run took "
                     f"{summary.seconds:.3g} s.")
    elif summary.times:
        notes.append(f"The run took {summary.seconds:.3g} s. No call of the same length stayed dense, so there is no "
                     f"time to compare with; with start_percent above 0 there is.")
    if summary.pv_skipped:
        notes.append(f"{summary.pv_skipped:.1%} of the remaining products with V skipped by pv_threshold.")
    return notes


def _advice(summary: RunSummary) -> list[str]:
    return [advice for reason in summary.dense for start, advice in _ADVICE.items() if reason.startswith(start)]


def _block_map(summary: RunSummary, block: Block | None, head: int, step: int):
    """Pixels and title of the block map."""
    kept = summary.maps
    if kept is None or not kept.maps:
        return None, f"No block map: step {step} was not sparse" if step and summary.sparse else ""
    if block is None:
        block = next(iter(kept.maps))
    found = next(filter(block.names, kept.maps), None)
    if found is None:
        return None, f"No block map of block {block}: it will be kept in the next run"
    heads = kept.maps[found]
    if head >= len(heads):
        return None, f"No block map of head {head}: the model has heads 0 to {len(heads) - 1}"
    title = f"Block map: block {found}, head {head}, step {kept.step}"
    return heads[head], title + ("" if step in (0, kept.step) else f" (step {step} will be kept in the next run)")


def _settings(settings: Settings, summary: RunSummary) -> list[str]:
    lines = [", ".join(f"{name} {_value(value)}" for name, value in settings.params.items()),
             f"start_percent {settings.start_percent:g}, end_percent {settings.end_percent:g}, min_tokens "
             f"{settings.min_tokens}, skipped_blocks {settings.skipped}, pv_precision {settings.pv_dtype}, hilbert "
             f"{settings.hilbert}"]
    if settings.tuned is not None:
        lines.insert(0, f"tuned: {settings.tuned}; the other layers use:")
    if settings.dense_blocks:
        lines.append(f"dense_blocks {settings.dense_blocks}")
    lines += [f"{count} calls over tokens in {order}" for order, count in summary.tokens.items()]
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    return lines


def _value(value: float | torch.Tensor) -> str:
    if isinstance(value, torch.Tensor):
        return "one a head"
    return "off" if value == math.inf else f"{value:g}"
