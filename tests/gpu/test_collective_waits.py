"""Waits for a late rank by CUDA events; the ranks share the GPU where there is only one."""

from nanotrain.config.engine import Device
from nanotrain.config.parallel import DataParallel
from tests.engines.test_collective_waits import check, engine_of, waits_of
from tests.ranks import run_ranks


def measure() -> dict:
    engine = engine_of(DataParallel.ddp, Device.cuda)[0]
    waits_of(engine)  # CUDA loads its kernels
    return waits_of(engine)


def test_the_early_rank_waits_for_the_late_one_and_not_the_other_way():
    check(*run_ranks(measure, 2))
