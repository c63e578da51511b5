"""A run in words, for the picture of a report and for its text."""
from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call.plan import NodeSettings
from ..call.transformer_blocks import ListedBlocks, TransformerBlock
from ..run.block_maps import MapRequest
from ..run.summary import RunSummary
from .advice import about_dense_calls, about_little_skipped, about_refreshes

SPARSE = "sparse"  # the label of the calls that went sparse
_REASONS = 3  # that are listed; there may be one for each layer
QUANTISED = "quantised, "  # how the labels begin of those that the kernels computed dense


@dataclass(frozen=True)
class Panels:
    """What a report says and shows.

    failed: whether the user should be alarmed.
    cells: {(transformer block, step): sparsity, None where all calls stayed dense}.
    calls: [(label, count)], the sparse ones first.
    sparsity: mean share skipped by the sparse ones, None where it is not known.
    block_map: uint8 (rows, columns), 255 where every pair of a pixel is attended.
    map_title: of the block map, or why there is none.
    settings: lines of text.
    """

    headline: str
    notes: Sequence[str]
    failed: bool
    cells: Mapping[tuple[TransformerBlock, int], float | None] = field(default_factory=dict)
    calls: Sequence[tuple[str, int]] = ()
    sparsity: float | None = None
    block_map: Tensor | None = None
    map_title: str = ""
    settings: Sequence[str] = ()

    def text(self) -> str:
        calls = [f"{count} calls {label}" for label, count in self.calls]
        return "\n".join([self.headline, *self.notes, *calls, *self.settings])


def failed_report(headline: str, *notes: str) -> Panels:
    return Panels(headline, notes, failed=True)


def run_report(summary: RunSummary | None, settings: NodeSettings, wanted: MapRequest = MapRequest(),
               prompt: str | None = None) -> Panels:
    """The report of a run, None for no run yet. prompt: ComfyUI's id of the prompt that asks for the report."""
    if summary is None:
        return failed_report("This model has not been sampled yet",
                             "Connect the model to the sampler, and the sampler's output to this node.")
    headline, *notes = _outcome(summary, settings)
    if summary.prompt != prompt:
        notes.insert(0, f"This model was not sampled in this prompt. What follows is its last run, which ended on "
                        f"{time.strftime('%Y-%m-%d at %H:%M', time.localtime(summary.ended))}.")
    calls = [(SPARSE, summary.sparse)] if summary.sparse else []
    calls += [(f"{QUANTISED}{summary.quantised_over}: {reason}", count) for reason, count in summary.quantised.items()]
    calls += [
        (f"dense: {reason}" + (f" ({summary.details[reason]})" if reason in summary.details else ""), count)
        for reason, count in summary.dense.items()]
    block_map, map_title = _block_map(summary, settings, wanted)
    return Panels(headline, notes, not summary.sparse, summary.cells, calls, summary.sparsity, block_map,
                  map_title, _settings(settings, summary))


def _outcome(summary: RunSummary, settings: NodeSettings) -> list[str]:
    """The headline and the notes below it."""
    if summary.unread:
        return [_sentence(summary.unread), *about_dense_calls(summary)]
    if summary.steps == 0:
        return ["The sampler took no step", "Nothing was left to sample: look at its steps, start_at_step, denoise."]
    if not summary.sparse:
        headline = f"Nothing was {'skipped' if summary.quantised else 'accelerated'} in this run"
        return [headline, *filter(None, [summary.problem]), *about_dense_calls(summary)]
    notes = [about_little_skipped(summary, settings), *about_dense_calls(summary), *_speed(summary)]
    if summary.pv_skipped:
        notes.append(f"{summary.pv_skipped:.1%} of the remaining products with V skipped by pv_threshold.")
    amount = f"{summary.sparsity:.1%}" if summary.sparsity else "None"
    return [f"{amount} of the attention skipped" + (" (CPU reference)" if summary.reference else ""),
            *filter(None, notes)]


def _speed(summary: RunSummary) -> list[str]:
    if summary.reference:
        return ["Computed on the CPU by the reference, which shows what is skipped and saves no time."]
    if summary.saved is not None and (speedup := summary.speedup):
        sparse = sum(times.calls * times.sparse for times in summary.times if times.dense is not None) / 1000
        dense = sparse + summary.saved
        change = f"{speedup:.2f} × faster" if speedup >= 1 else f"{1 / speedup:.2f} × slower"
        return [f"Sparse calls took {sparse:.3g} s in place of {dense:.3g} s: {change}. The run took "
                f"{summary.seconds:.3g} s."]
    if summary.times:
        return [f"The run took {summary.seconds:.3g} s. No call of the same length stayed dense, so there is no time "
                f"to compare with; with start_percent above 0 there is."]
    return []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _block_map(summary: RunSummary, settings: NodeSettings, wanted: MapRequest) -> tuple[Tensor | None, str]:
    """Pixels and title of the block map; without pixels the title says why."""
    block, head, step = wanted.block, wanted.head, wanted.step
    kept = summary.maps
    if kept is None or not summary.sparse:
        return None, ""
    if not kept.maps:
        return None, f"No block map: {_missing_step(summary, step)}"
    found = next((kept_block for kept_block in kept.maps if block is None or block.names(kept_block)), None)
    if found is None:
        return None, f"No block map of block {block}: {_missing_block(summary, settings, block)}"
    heads = kept.maps[found]
    if head >= len(heads):
        return None, f"No block map of head {head}: the model has heads 0 to {len(heads) - 1}"
    title = f"Block map: block {found}, head {head}, step {kept.step}"
    return heads[head], title + ("" if step in (0, kept.step) else f" ({_missing_step(summary, step)})")


def _missing_step(summary: RunSummary, step: int) -> str:
    if step == 0:
        return "none was kept"
    if step > summary.steps:
        return f"the run had {summary.steps} steps, no step {step}"
    return f"step {step} will be kept in the next run" if step in summary.by_step else f"step {step} was not sparse"


def _missing_block(summary: RunSummary, settings: NodeSettings, block: TransformerBlock | None) -> str:
    cells = [share for (other, _), share in summary.cells.items() if block is not None and block.names(other)]
    if any(share is not None for share in cells):
        return "it will be kept in the next run"
    if cells:
        return "it stayed dense"
    return f"the blocks with at least {settings.min_tokens} tokens are {_listed(other for other, _ in summary.cells)}"


def _listed(blocks: Iterable[TransformerBlock]) -> str:
    """The transformer blocks as a user lists them, such as "double:0-18, single:0-37"."""
    ranges: list[tuple[str, int, int]] = []
    for block in sorted(set(blocks)):
        kind, first, last = ranges[-1] if ranges else ("", 0, -2)
        if (kind, last + 1) == (block.kind, block.index):
            ranges[-1] = kind, first, block.index
        else:
            ranges.append((block.kind, block.index, block.index))
    return str(ListedBlocks(tuple(ranges)))


def _settings(settings: NodeSettings, summary: RunSummary) -> list[str]:
    judged = settings.params.selection == "cdf"
    lines = [", ".join(f"{name} {_value(value)}" for name, value in settings.params.items()
                       if judged or name != "similarity_threshold"),
             f"start_percent {settings.start_percent:g}, end_percent {settings.end_percent:g}, min_tokens "
             f"{settings.min_tokens}, skipped_blocks {settings.skipped}, pv_precision {settings.pv_dtype}, hilbert "
             f"{settings.hilbert}, dense_steps {settings.dense_steps}"]
    if settings.tuned is not None:
        lines.insert(0, f"tuned: {settings.tuned}; the other layers use:")
    lines += [f"{count} calls used the widgets in place of params: {reason}"
              for reason, count in list(summary.untuned.items())[:_REASONS]]
    if settings.dense_blocks:
        lines.append(f"dense_blocks {settings.dense_blocks}")
    if settings.refreshes:
        lines.append(f"refreshes {settings.refreshes}; residuals {summary.residuals or 'unknown'}")
    lines += filter(None, [about_refreshes(settings)])
    lines += [f"{count} calls over tokens in {order}" for order, count in summary.tokens.items()]
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    return lines


def _value(value: float | Tensor) -> str:
    if isinstance(value, Tensor):
        return "one a head"
    return "off" if value == math.inf else f"{value:g}"
