"""Layers whose optimum is known because it was planted: what the search for thresholds measures in its tests."""
import math

import torch

from comfyui_spargeattn.nodes.tuned.search import AMOUNTS, Bounds, Measured, TunedSetting

BOUNDS = Bounds(0.05, 0.06)


def planted(needs, *, curves=("row-major",), skipped="drop", pv_dtype="fp16", selection="cdf", floor=0.0,
            pv_needs=math.inf, kept_of=lambda amount: amount, calls=None):
    """A layer whose heads hold 0.05 from the amount `needs` (H,) on, in these choices alone; others need every block.

    curves: the good one of each head of K. floor: error with every block. pv_needs: least P·V threshold that holds.
    """
    needs = torch.tensor(needs)
    heads = len(needs)

    def measure(setting: TunedSetting) -> Measured:
        if calls is not None:
            calls.append(setting)
        amount, pv = setting.params.amount, torch.as_tensor(setting.params.pv_threshold)
        good = torch.tensor([a == b for a, b in zip(setting.curves, curves * (len(setting.curves) // len(curves)))])
        good = good.repeat_interleave(heads // len(setting.curves))
        good &= setting.skipped == skipped and setting.params.selection == selection
        if pv_dtype != setting.pv_dtype:
            floor_here = 1.0
        else:
            floor_here = floor
        least = torch.where(good, needs, 1.0)
        error = floor_here + torch.where(amount >= least, 0.04, 0.2) * (amount < 1)
        error += torch.where(pv >= pv_needs, 0.0, 0.5)
        return Measured(error, torch.where(amount < 1, kept_of(amount), 1.0))

    return measure


def least_amount(selection, need):
    return min(a for a in AMOUNTS[selection] if a >= need)


def by_candidate(error_of, kept_of=lambda setting, amount: amount, shared=lambda setting, error: error):
    """A measure of two heads and more whose errors `error_of(curve, similarity, amount, head)` may be anything.

    shared: what becomes of the errors (H,) of heads that are measured together.
    """
    def measure(setting: TunedSetting) -> Measured:
        amount, heads = setting.params.amount.tolist(), len(setting.params.amount)
        curves = [setting.curves[h // (heads // len(setting.curves))] for h in range(heads)]
        similarity = setting.params.similarity_threshold.tolist()
        error = torch.tensor([error_of(*x) for x in zip(curves, similarity, amount, range(heads))])
        return Measured(shared(setting, error), kept_of(setting, setting.params.amount))

    return measure


def learnt(setting):
    """A measure of four heads that differ, the last one dense."""
    need = torch.tensor([0.3, 0.5, 0.7, 1.0])
    amount, pv = setting.params.amount, torch.as_tensor(setting.params.pv_threshold)
    return Measured(torch.where(amount >= need, 0.03, 0.3) + (pv < 9) * 0.1, amount)
