"""The kernel for Hopper compiles without a GPU, and its inner loop is what it was measured with."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed (it comes with torch for CUDA)")
triton = pytest.importorskip("triton", reason="triton is not installed")

from nanotrain.ops.gpu import fp8_wgmma  # noqa: E402
from nanotrain.ops.gpu.fp8_wgmma import compiled  # noqa: E402


def main_loop(code: bytes, folder: Path) -> list[str]:
    """Return the instructions from the first of the tensor cores' products to the last, as the machine gets them."""
    path = folder / "product.cubin"
    path.write_bytes(code)
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not disassembler.exists():
        pytest.skip("triton came without nvdisasm")
    text = subprocess.run(
        [disassembler, "-c", path], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    names = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text)
    places = [index for index, name in enumerate(names) if name == "QGMMA"]
    return names[places[0] : places[-1] + 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_main_loop_holds_everything_in_registers(tmp_path, blocks, dtype):
    """Four stages, in each two waves of four products, whose results are scaled and added with as little else as can be."""
    loop = main_loop(compiled(dtype, blocks=blocks), tmp_path)
    assert loop.count("QGMMA") == 32
    assert not {"STL", "LDL"} & set(loop), "registers are spilled"
    first_stage = [index for index, name in enumerate(loop) if name == "QGMMA"][8]
    assert first_stage < (200 if blocks else 330)


def test_a_compiler_error_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(fp8_wgmma, "__file__", str(tmp_path / "broken.py"))
    (tmp_path / "broken.cu").write_text("no C++", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"does not compile: .*error"):
        compiled(torch.bfloat16, blocks=True)
