"""Runs a function of a test on several ranks, each a process of its own as under torchrun; over NCCL where each has a GPU."""

import faulthandler
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn.functional  # before a group is made, as in start_ranks
import torch.multiprocessing as mp

from nanotrain.runtime.distributed import choose_backend, current_world, start_ranks, stop_ranks, wait_for_all


def run_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, environment: dict[str, str] | None = None
) -> list[Any]:
    """Return what `function(*arguments)` returned on each of `size` ranks.

    Args:
        function: of a module, so that a fresh process can import it; called after the ranks are connected.
        size: number of ranks.
        arguments: anything that pickles.
        environment: further variables of every rank.

    Raises:
        AssertionError: a rank failed; with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(
            _rank, (size, folder, function, arguments, environment or {}), nprocs=size, join=False, daemon=False
        )
        try:
            while not context.join():
                pass
        except Exception as error:
            failures = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.failure"))]
            raise AssertionError("\n".join(filter(None, failures)) or str(error)) from None
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(size)]


def _rank(
    rank: int,
    size: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= environment
    torch.set_num_threads(1)
    stacks = (Path(folder) / f"{rank}.failure").open("w", encoding="utf-8")  # of a rank that a signal ends
    faulthandler.enable(stacks)
    try:
        store = dist.FileStore(f"{folder}/store", size)
        if size > 1:
            dist.init_process_group(choose_backend(current_world()), store=store, rank=rank, world_size=size)
        start_ranks()
        result = function(*arguments)
        wait_for_all()  # a rank that leaves early would cut off those that are still connecting
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"{rank}.failure").write_text(f"rank {rank}:\n{traceback.format_exc()}", encoding="utf-8")
        raise
    finally:
        stop_ranks()
