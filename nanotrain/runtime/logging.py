"""Log lines that do not tear the progress bar."""

import logging
import sys

from tqdm import tqdm

FORMAT = "%(asctime)s %(message)s"
"""Level and module are left out: a line is for the person who waits for the run."""


class _ProgressSafeHandler(logging.Handler):
    """Writes to stderr above any tqdm bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # logging's own contract: a failing log line must not stop a run
            self.handleError(record)


class _LevelFormatter(logging.Formatter):
    """Names the level only where it matters."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {line}"


def set_up_logging(level: int = logging.INFO, rank: int = 0) -> None:
    """Send the package's log to stderr; calling it again changes the level only.

    The first rank speaks for all; the others report errors only, under their number.
    """
    logger = logging.getLogger("nanotrain")
    logger.setLevel(level if rank == 0 else max(level, logging.ERROR))
    logger.propagate = False
    if not any(isinstance(handler, _ProgressSafeHandler) for handler in logger.handlers):
        handler = _ProgressSafeHandler()
        handler.setFormatter(_LevelFormatter(FORMAT if rank == 0 else f"rank {rank}: {FORMAT}", datefmt="%H:%M:%S"))
        logger.addHandler(handler)


_said: set[str] = set()


def log_once(message: str) -> None:
    """Log a line at INFO the first time it is said in this process: chosen kernels, devices, precisions."""
    if message not in _said:
        _said.add(message)
        logging.getLogger("nanotrain").info("%s", message)
