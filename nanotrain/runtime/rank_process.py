"""What the launcher starts as a rank: a module's command line that does not outlive its launcher.

python -m nanotrain.runtime.rank_process LAUNCHER_PID MODULE ARGUMENT ...
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(launcher: int) -> None:
    """Have the kernel kill this process when its launcher dies (Linux): nobody would end or restart it any more."""
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != launcher:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _, launcher, module, *arguments = sys.argv
    end_with(int(launcher))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
