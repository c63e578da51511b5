"""Whether a sampler adds fresh noise between the steps, after which nothing of an earlier step is worth adding."""
from __future__ import annotations

import inspect
from typing import Any

# They take a noise sampler and add none of its noise.
_STEADY = {"sample_res_multistep", "sample_res_multistep_cfg_pp"}


def adds_noise(sampler: Any) -> bool:
    """Of a sampler of ComfyUI, whose function has a parameter `noise_sampler` where it may; true where it is not known.

    `eta` and `s_noise` of 0 turn the noise off, and `s_churn` turns it on where there is no noise sampler.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return True
    options = getattr(sampler, "extra_options", None) or {}
    parameters = inspect.signature(function).parameters

    def value(name: str, missing: float) -> float:
        given = options.get(name)
        if given is None and name in parameters:
            given = parameters[name].default
        return given if isinstance(given, (int, float)) else missing

    if value("s_churn", 0.0) > 0:
        return True
    if getattr(function, "__name__", "") in _STEADY or not any(name.startswith("noise_sampler") for name in parameters):
        return False
    return value("eta", 1.0) != 0 and value("s_noise", 1.0) != 0
