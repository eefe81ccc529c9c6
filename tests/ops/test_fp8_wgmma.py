"""The kernel for Hopper compiles without a GPU, and its inner loop is what it was measured with."""

import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed (it comes with torch for CUDA)")
triton = pytest.importorskip("triton", reason="triton is not installed")

from nanotrain.ops.gpu import fp8_wgmma  # noqa: E402
from nanotrain.ops.gpu.fp8_wgmma import compiled  # noqa: E402


def inner_loop(code: bytes, folder: Path) -> list[str]:
    """Return the instructions between two branches that hold the tensor cores' products, as the machine gets them."""
    path = folder / "product.cubin"
    path.write_bytes(code)
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not disassembler.exists():
        pytest.skip("triton came without nvdisasm")
    text = subprocess.run(
        [disassembler, "-c", path], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    names = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text)
    ends = [-1, *(index for index, name in enumerate(names) if name == "BRA")]
    return max((names[a + 1 : b] for a, b in pairwise(ends)), key=lambda part: part.count("QGMMA"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_inner_loop_holds_everything_in_registers(tmp_path, blocks, dtype):
    loop = inner_loop(compiled(dtype, blocks=blocks), tmp_path)
    assert loop.count("QGMMA") == 8 and loop.count("FFMA") == 128
    assert not {"STL", "LDL"} & set(loop), "registers are spilled"
    assert len(loop) < (210 if blocks else 340)


def test_a_compiler_error_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(fp8_wgmma, "__file__", str(tmp_path / "broken.py"))
    (tmp_path / "broken.cu").write_text("no C++", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"does not compile: .*error"):
        compiled(torch.bfloat16, blocks=True)
