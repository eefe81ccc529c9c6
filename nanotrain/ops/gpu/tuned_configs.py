"""Tuned launch parameters of mamba-ssm's Triton kernels for the published shapes.

On a fresh machine Triton compiles and times about 130 variants of 14 kernels at the first step, for 60 to 90 seconds. For
the shapes in tuned_configs.json only the one that was found best is compiled. The result does not depend on the choice.
"""

import json
from pathlib import Path
from typing import Any

import torch
from mamba_ssm.ops.triton import (  # pyright: ignore[reportMissingImports]
    ssd_bmm,
    ssd_chunk_scan,
    ssd_chunk_state,
    ssd_combined,
    ssd_state_passing,
)

_MODULES = (ssd_bmm, ssd_chunk_state, ssd_state_passing, ssd_chunk_scan, ssd_combined)
_TABLE: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("tuned_configs.json").read_text(encoding="utf-8")
)


def tuners() -> dict[str, Any]:
    """Return the autotuner of every kernel, by the kernel's name."""
    found = {}
    for module in _MODULES:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(vars(value).get("configs"), list):
                found[name] = value
    return found


_ALL = {name: (tuner, list(tuner.configs)) for name, tuner in tuners().items()}
_current: list[str] = [""]


def restrict_to_tuned(head_dim: int, state_size: int, chunk_size: int, dtype: torch.dtype) -> None:
    """Leave each kernel only its tuned variant for these sizes on this GPU, or all of them when they are not tuned."""
    major, minor = torch.cuda.get_device_capability()
    key = f"sm_{major}{minor} P {head_dim} N {state_size} chunk {chunk_size} {str(dtype).removeprefix('torch.')}"
    if key == _current[0]:
        return
    _current[0] = key
    table = _TABLE.get(key, {})
    for name, (tuner, configs) in _ALL.items():
        chosen = [config for config in configs if name in table and describe(config) == table[name]]
        tuner.configs = chosen[:1] or configs


def describe(config: Any) -> dict[str, int]:
    """Return what distinguishes a variant: block sizes, warps and stages."""
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def chosen() -> dict[str, dict[str, int]]:
    """Return the variant that each kernel ran with last: a row of the table, once everything has run."""
    ran = {name: vars(tuner).get("best_config") for name, (tuner, _) in _ALL.items()}
    return {name: describe(config) for name, config in ran.items() if config is not None}
