"""Our Triton kernels in Triton's interpreter, so that a machine without a GPU tests their arithmetic too.

A process of its own runs them: the interpreter is chosen when Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")
ROOT = Path(__file__).parents[2]

PRELUDE = """
import torch
import triton.runtime.interpreter as interpreter
from tests.ops.comparison import worst_error

patch = interpreter._patch_lang_tensor  # Triton 3.6 cannot turn its scalars into indices under NumPy 2
def patched(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patched
generator = torch.Generator().manual_seed(1)
def randn(*shape):
    return torch.randn(*shape, generator=generator)
"""

CASES = {
    "norms": """
from nanotrain.ops.gpu.gated_norm_triton import grouped_gated_rms_norm
from nanotrain.ops.gpu.rms_norm_triton import rms_norm
from nanotrain.ops.gpu.squared_relu_triton import squared_relu
from nanotrain.ops.rms_norm import grouped_gated_rms_norm_ref, rms_norm_ref
from nanotrain.ops.squared_relu import squared_relu_ref
def gated(function):
    return lambda y, z, w: function(y, z[..., 8:], w, 1e-5, 2)
pairs = [
    (gated(grouped_gated_rms_norm), gated(grouped_gated_rms_norm_ref), [randn(2, 3, 40), randn(2, 3, 48), randn(40)]),
    (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_ref(x, w, 1e-5), [randn(2, 3, 40), randn(40)]),
    (squared_relu, squared_relu_ref, [randn(3, 5, 7)]),
]
for fast, slow, inputs in pairs:
    error = worst_error(fast, slow, inputs, torch.float32)
    assert error < 2e-6, error
""",
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_their_slow_twins(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PRELUDE + CASES[name]]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
