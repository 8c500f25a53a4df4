"""Imports the whole package as Windows or macOS would, and trains: ``python other_systems.py win32``.

The system's name is another one, and what it lacks of Python's POSIX modules and names is gone. Torch and the like are
imported before, as they are built for the system that this really is.
"""

import importlib
import os
import pkgutil
import signal
import sys
import tempfile
from importlib.abc import MetaPathFinder
from typing import Any

import filelock  # noqa: F401 (made for the system that this really is, as is psutil)
import psutil  # noqa: F401

LACKED = {
    "darwin": {os: ["sched_getaffinity", "posix_fadvise", "memfd_create"], signal: ["sigwaitinfo", "sigtimedwait"]},
    "win32": {
        os: [
            "chown", "fchmod", "fchown", "fork", "forkpty", "getgid", "getpgid", "getuid", "geteuid", "killpg",
            "memfd_create", "mkfifo", "nice", "posix_fadvise", "posix_spawn", "pread", "preadv", "pwrite", "pwritev",
            "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpgid", "setsid", "statvfs",
            "sync", "sysconf", "sysconf_names", "uname", "wait",
        ],
        signal: [
            "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP",
            "SIGUSR1", "SIGUSR2", "SIGXFSZ", "alarm", "pthread_kill", "pthread_sigmask", "setitimer", "sigpending",
            "sigtimedwait", "sigwait", "sigwaitinfo",
        ],
    },
}  # fmt: skip
MODULES = {
    "darwin": {"spwd"},
    "win32": {"curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"},
}


class Hidden(MetaPathFinder):
    """Finds none of some modules, and has nobody else look for them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def modules() -> list[str]:
    """Every module of the package, but for tests and examples, and what needs a package that isn't here."""
    import stratagem

    found = []
    for room in ("framework", "precision", "strategies", "testing"):
        package = importlib.import_module(f"stratagem.{room}")
        found += [module.name for module in pkgutil.walk_packages(package.__path__, f"stratagem.{room}.")]
    here = []
    for name in [stratagem.__name__, *found]:
        try:
            importlib.import_module(name)
            here.append(name)
        except ModuleNotFoundError as error:
            assert error.name and not error.name.startswith("stratagem"), error
            print("without", name, "which needs", error.name)
    return here


def become(system: str) -> None:
    """Make this process one of another system, as far as Python's modules tell it."""
    for module, names in LACKED[system].items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in [name for name in sys.modules if name in MODULES[system]]:
        del sys.modules[name]
    for name in [name for name in sys.modules if name.partition(".")[0] == "stratagem"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Hidden(MODULES[system]))
    sys.platform = system


def train(directory: str) -> None:
    """Train, save and go on, on one device."""
    import torch
    from stratagem import Fit, TrainModule
    from torch.utils.data import TensorDataset

    class Line(TrainModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

        def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(outputs, batch[1])

    x = torch.linspace(-1, 1, 64)[:, None]
    for updates in (8, 16):
        fit = Fit(Line(), TensorDataset(x, 2 * x), output_dir=directory, max_steps=updates, learning_rate=0.1,
                  per_device_train_batch_size=8, save_steps=8, progress=False)  # fmt: skip
        print("trained", fit.train(resume_from_checkpoint=True).global_step)


if __name__ == "__main__":
    names = modules()
    become(sys.argv[1])
    for name in names:
        importlib.import_module(name)
    print("imported", len(names))
    with tempfile.TemporaryDirectory() as directory:
        train(directory)
