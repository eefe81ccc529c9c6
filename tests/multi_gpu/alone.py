"""One GPU's part of the weak scaling, in a process of its own: speed.py starts it before its ranks touch their GPUs."""

from tests.multi_gpu.cases import options_of, run_part
from tests.multi_gpu.speed import ALONE_SECONDS, PART, alone

if __name__ == "__main__":
    run_part(PART, alone, options_of(ALONE_SECONDS))
