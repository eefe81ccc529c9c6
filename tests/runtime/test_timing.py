"""Rates are arithmetic; memory is compared with what a process really takes."""

import pytest

from nanotrain.runtime import timing


def test_rates():
    assert timing.tokens_per_second(500, 2.0) == 250 and timing.tokens_per_second(5, 0.0) == 0
    assert timing.eta_seconds(5, 20, 10.0) == 30 and timing.eta_seconds(0, 20, 0.0) == 0
    assert timing.mfu(50e12, 0.5, 200e12) == pytest.approx(0.5)
    assert timing.mfu(1.0, 0.0, 1.0) is None and timing.mfu(1.0, 1.0, None) is None


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12)]
)
def test_peaks_go_by_the_devices_name(name, peak):
    assert timing.peak_flops_per_second(name) == peak


def test_a_cpu_has_no_peak():
    assert timing.peak_flops_per_second(timing.device_name("cpu")) is None


def test_the_high_water_mark_sees_an_allocation_and_can_be_reset():
    timing.reset_peak_memory()
    before = timing.peak_memory_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert timing.memory_bytes("cpu") > 64 * 2**20
    del block
    assert timing.peak_memory_bytes() - before > 48 * 2**20
