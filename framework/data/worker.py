"""What a worker process that loads data does with signals: it outlives the one that asks the run to end."""

import os
import signal
import threading
from typing import Any

IGNORED = "SIGINT", "SIGUSR1", "SIGUSR2"  # where the system has them


class OutliveSignal:
    """Has a worker leave signals to the process that trains, which still needs data for its last update. A terminal, or
    a scheduler, sends them to all processes alike.

    Args:
        worker_init_fn: the user's function, which is called next.
    """

    def __init__(self, worker_init_fn: Any = None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        """Prepare the worker; torch calls this there before anything is read."""
        for name in IGNORED:
            if name in signal.Signals.__members__:
                signal.signal(signal.Signals[name], signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # not on macOS, nor on Windows
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=obey_parent, args=(os.getppid(),), daemon=True).start()
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


def obey_parent(parent: int) -> None:
    """End this process at a SIGTERM of its parent alone, by which torch ends a worker that is stuck."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
