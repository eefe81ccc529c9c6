import subprocess
import sys
import textwrap

from nanotrain.runtime.watchdog import EXIT_HANG

PROGRAM = """
import logging, sys, threading, time
from nanotrain.runtime.watchdog import Watchdog
logging.basicConfig()
def a_thread_that_waits():
    time.sleep(60)
def a_step_that_hangs():
    {hang}
with Watchdog(0.5) as watchdog:
    for _ in range(8):
        watchdog.beat("training step 7")
        time.sleep(0.1)
    threading.Thread(target=a_thread_that_waits, daemon=True).start()
    a_step_that_hangs()
"""


def run(hang: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROGRAM).format(hang=hang)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_a_hang_ends_with_the_stacks_of_all_threads():
    done = run("time.sleep(60)")
    assert done.returncode == EXIT_HANG
    assert "while training step 7" in done.stderr and "watchdog_seconds" in done.stderr
    assert "a_step_that_hangs" in done.stderr and "a_thread_that_waits" in done.stderr


def test_steps_in_time_are_left_alone():
    assert run("pass").returncode == 0
