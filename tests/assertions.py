"""Comparisons that several tests share."""
import torch
from torch import Tensor


def worst(error: Tensor, **values: Tensor) -> str:
    """Where `error` is largest (NaN counts as largest), with the other tensors' values there."""
    flat = error.nan_to_num(nan=torch.inf).flatten().argmax()
    place = tuple(int(i) for i in torch.unravel_index(flat, error.shape))
    return f"worst at {place}: error {error[place].item():.4g}" + "".join(
        f", {name} {value[place].item():.6g}" for name, value in values.items())


def assert_near(actual: Tensor, expected: Tensor, *, atol: float | Tensor, what: str = "value") -> None:
    """Assert that |actual - expected| ≤ atol everywhere and that no difference is NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs()
    atol = torch.as_tensor(atol, dtype=torch.float64, device=error.device).expand_as(error)
    assert bool((error <= atol).all()), f"{what}: " + worst(
        torch.where(error <= atol, 0.0, error), actual=actual, expected=expected, tolerance=atol)


def assert_within_budget(actual: Tensor, emulated: Tensor, exact: Tensor, *, rms_slack: float = 1.05,
                         max_slack: float = 1.5, floor: float = 0.0, chance: float = 0.0,
                         sums: torch.dtype = torch.float32) -> float:
    """Assert that the error of `actual` against float64 is no larger than that of an eager emulation.

    `emulated` has the same arithmetic as `actual`, before its rounding to the output's dtype; where that rounds by
    chance, it may hold several draws, in a dimension before the others. The budget is its error, plus half a unit of
    that dtype and float32's own rounding. The RMS error may exceed the budget by 5%, because both round the same
    numbers in another order. The maximum has a wider slack, because it is one draw of a distribution's tail. `floor` is
    an RMS error that `actual` may have where the emulation has none; the maximum may have twice as much. `chance` is an
    error that one row of `actual` (..., D) may have on top. `sums` is the dtype of partial sums; 16 bits round once
    more. Returns the larger of both errors as a share of its limit.
    """
    assert actual.shape == exact.shape and bool(actual.isfinite().all()), f"not finite or misshapen: {actual.shape}"
    error, budget = (actual.double() - exact).abs(), (emulated.double() - exact).abs()
    rounding = exact.abs() * torch.finfo(actual.dtype).eps / 2 + exact.abs().max() * 1e-6
    rounding += torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    if sums == torch.float16:
        rounding += exact.abs() * torch.finfo(sums).eps / 2
    details = worst(error, actual=actual, emulated=emulated.reshape(-1, *exact.shape)[0], exact=exact)

    def rms(x):
        return x.square().mean().sqrt().item()

    share, one_row = 0.0, chance * (exact.shape[-1] / exact.numel()) ** 0.5
    for what, found, allowed in (
            ("RMS", rms(error), rms_slack * rms(budget) + rms(rounding) + floor + one_row),
            ("maximum", error.max().item(),
             max_slack * budget.max().item() + rounding.max().item() + 2 * floor + chance)):
        assert found <= allowed, f"{what} error {found:.4g} > {allowed:.4g}; {details}"
        share = max(share, found / max(allowed, 1e-300))
    return share


def relative_l1(out: Tensor, exact: Tensor) -> float:
    """Σ|O−O'| / Σ|O|, the paper's measure."""
    return ((out.double() - exact.double()).abs().sum() / exact.double().abs().sum()).item()
