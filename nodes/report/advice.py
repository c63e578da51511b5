"""What a user can do about a run that skipped little or nothing, for the log and for the report."""
from __future__ import annotations

from ..call.plan import ALONE, NodeSettings
from ..run.summary import RunSummary

# Advice by the start of a reason to stay dense. These reasons are faults: a report tells them even where other calls
# went sparse.
FAULTS = {
    "fast kernels failed": "The fast kernels failed. Cause and remedy stand in brackets in the list of calls; mostly a "
                           "C compiler is missing, or Triton does not fit torch (on Windows: triton-windows). Restart "
                           "ComfyUI afterwards.",
    "out of memory": "Sparse attention ran out of memory: it needs some beside q, k and v. Make the picture or clip "
                     "smaller, end other programs that use the GPU, or start ComfyUI with --reserve-vram; pv_precision "
                     "int8 takes less than fp16.",
    "unsupported call": "This model calls attention in a way that is not known yet: please report it with this text.",
}
# Reasons that stand nowhere here call for nothing.
_ADVICE = FAULTS | {
    "no fast kernel": "The fast kernels need Triton and an NVIDIA GPU from RTX 30 or A100 on, or an AMD GPU from RDNA3 "
                      "or CDNA3 on. Triton comes with torch on Linux; on Windows: pip install triton-windows.",
    "too many tokens for the CPU": "A GPU is needed for sequences of this length.",
    "fewer tokens than min_tokens": "Lower min_tokens, or make the picture or clip larger: short sequences gain "
                                    "little.",
    "outside start_percent": "Sampling outside start_percent … end_percent is dense on purpose.",
    "listed in dense_blocks": "These blocks are listed in dense_blocks.",
    "tuned to stay dense": "Nothing can be skipped at the error tuned for: tune with larger l1, or disconnect params.",
    "mask that differs": "This model's mask hides or weighs keys differently from query to query, which only dense "
                         "attention can do.",
    "unsupported dtype": "Load the model in 16 bits.",
}


def about_dense_calls(summary: RunSummary) -> list[str]:
    """A sentence or two for each reason that is known; for faults alone, unless most of the run stayed dense."""
    known = FAULTS if summary.sparse and not summary.mostly_dense else _ADVICE
    return [advice for reason in summary.not_sparse for start, advice in known.items() if reason.startswith(start)]


def about_little_skipped(summary: RunSummary, settings: NodeSettings) -> str:
    """Why a run that was sparse skipped so little, and what to change; empty where it skipped enough."""
    if not summary.skipped_little:
        return ""
    amount = f"Only {summary.skipped:.1%}" if summary.skipped else "None"
    if summary.mostly_dense:
        return f"{amount} of the attention was skipped, because most of it stayed dense."
    return f"{amount} of the attention was skipped. {_what_to_change(settings)}"


def about_refreshes(settings: NodeSettings) -> str:
    """What it means that tuned parameters are used with other refreshes than they were tuned for; empty where they
    are not."""
    if settings.tuned is None or settings.tuned.refreshes == settings.refreshes:
        return ""
    if not settings.tuned.refreshes:
        return "params were tuned without refreshes; tuned for refreshes, they would skip more"
    effect = "further from" if settings.refreshes < settings.tuned.refreshes else "closer to"
    return (f"params were tuned for {settings.tuned.refreshes} refreshes, the node has {settings.refreshes}; the "
            f"result is {effect} dense attention's than they promise")


def _what_to_change(settings: NodeSettings) -> str:
    params = settings.params
    if settings.tuned is not None:
        return "Nearly nothing can be skipped at the error tuned for: tune with larger l1, or disconnect params."
    if params.topk is not None and settings.refreshes:
        return (f"Calls without a residual, as all are in few steps, keep at least {ALONE:.0%} of the attention, "
                "whatever keep_percent is. With refreshes 0 they keep that share; 50 is a start.")
    if params.topk is not None:
        return f"Lower keep_percent ({100 * params.topk:g}); 50 is a start."
    changes = [f"lower cdf_threshold ({params.cdf_threshold:g})", "choose topk with keep_percent 50",
               "find thresholds with Tune SpargeAttn"]
    if params.similarity_threshold > 0:
        changes.insert(0, f"lower similarity_threshold ({params.similarity_threshold:g}), because blocks whose tokens "
                          f"are less alike than that are always computed; 0 switches this off")
    return f"To skip more, {'; or '.join(changes)}. Each of these moves the result further from dense attention's."
