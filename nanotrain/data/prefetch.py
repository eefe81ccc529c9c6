"""Micro-batches of the next steps, made by a background thread while this one trains."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from nanotrain.model.batch import MicroBatch


class StepLoader(Protocol):
    """What a loader must be for this: any step can be asked for, with the same answer every time."""

    def microbatches(self, step: int) -> list[MicroBatch]: ...


class PrefetchingLoader:
    """Gives the batches of another loader; holds nothing that matters, so any step can be asked for next.

    Args:
        loader: stateless; used by one background thread at a time.
        num_steps: nothing is made ahead from this step on.
        depth: steps that are made ahead.
    """

    def __init__(self, loader: StepLoader, num_steps: int, depth: int = 2) -> None:
        assert depth >= 1
        self._loader, self._num_steps, self._depth = loader, num_steps, depth
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def microbatches(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of `step`; what the other loader raises is raised here, at its own step."""
        wanted = range(step, min(step + self._depth + 1, max(self._num_steps, step + 1)))
        for stale in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(stale).cancel()
        for other in wanted:
            if other not in self._ahead:
                self._ahead[other] = self._pool.submit(self._loader.microbatches, other)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Give up what was made ahead and end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
