"""What a command sets up in its process before anything heavy is imported: bars, logs, and who speaks for the run."""

from __future__ import annotations

import logging
import os
import sys


def is_rank_0() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def prepare_process() -> None:
    """Set what must be set before the losses or the engine are imported: bars and logs of this process."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # retries end in one line of ours; read at import, as the next
    if not (is_rank_0() and sys.stderr.isatty()):  # bars belong on a terminal
        os.environ.update(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    logging.basicConfig(format="%(message)s", handlers=[ErrorStream()])
    logging.getLogger("fastalign").setLevel(logging.INFO if is_rank_0() else logging.WARNING)


class ErrorStream(logging.Handler):
    """Logs to what standard error is now: a progress bar puts something in its place that prints above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(self.format(record), file=sys.stderr, flush=True)
