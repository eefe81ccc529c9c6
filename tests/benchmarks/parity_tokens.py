"""The tokens of the loss benchmark, packed into one file that is small enough to carry to a GPU machine.

    python -m tests.benchmarks.parity_tokens OUT.xz [--folder runs/parity_blend] [--tokens 14e6]

Builds the nano blend (data_prep/build_nano_blend.py: Debian packages, wheels, npm tarballs) at a vocabulary of 16,384 and 0.16 of
its text into --folder, then keeps whole sequences of 2,048 tokens, evenly spread over each category. Run again, the same packages
give the same file. bench_loss_parity reads it.
"""

import argparse
import io
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np

from nanotrain.data.token_shards import TokenShard

LENGTH, VOCABULARY, SCALE = 2048, 16384, 0.16
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 2**26}]
"""Tokens are two bytes wide."""


def sequences(data: Path, split: str, share: float) -> np.ndarray:
    """Return `share` of the sequences of all categories, [N, 2049] uint16: each begins with the last token of the one before."""
    rows = []
    for folder in sorted(path for path in data.iterdir() if (path / f"{split}.bin").exists()):
        shard = TokenShard(folder / split)
        tokens = shard.tokens(0, shard.num_tokens)
        count = (len(tokens) - 1) // LENGTH
        kept = np.unique(np.linspace(0, count - 1, max(int(count * share), 1)).astype(int))
        rows.append(np.stack([tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in kept]))
    return np.concatenate(rows).astype(np.uint16)


def unpack(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays `train` and `validation` of a packed file."""
    with np.load(io.BytesIO(lzma.decompress(file.read_bytes()))) as arrays:
        return {name: arrays[name] for name in ("train", "validation")}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/parity_blend"))
    parser.add_argument("--tokens", type=float, default=14e6, help="for training; a fiftieth of it for validation")
    arguments = parser.parse_args()
    # A process of its own: reading a packed file must not need the packages that the corpora come from.
    command = ["data_prep.build_nano_blend", "--output", str(arguments.folder), "--scale", str(SCALE)]
    code = subprocess.run([sys.executable, "-m", *command, "--vocab-size", str(VOCABULARY)], check=False).returncode
    if code:
        return code
    parts = {}
    for split, wanted in (("train", arguments.tokens), ("validation", arguments.tokens / 50)):
        everything = sequences(arguments.folder / "data", split, 1.0)
        parts[split] = sequences(arguments.folder / "data", split, min(wanted / (len(everything) * LENGTH), 1.0))
    buffer = io.BytesIO()
    np.savez(buffer, **parts)
    packed = lzma.compress(buffer.getvalue(), format=lzma.FORMAT_XZ, filters=FILTERS)
    arguments.out.write_bytes(packed)
    sizes = ", ".join(f"{len(rows) * LENGTH:,} tokens of {split}" for split, rows in parts.items())
    print(f"{arguments.out}: {sizes}, {len(packed) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
