"""What a run is run by and on: versions, command line, host, devices, and the commit of the user's program."""

import os
import platform
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

# Packages whose versions may change what a run computes, where the program has imported them.
PACKAGES = (
    "accelerate", "bitsandbytes", "datasets", "deepspeed", "lightning", "numpy", "optuna", "peft", "ray", "safetensors",
    "timm", "torch_geometric", "torch_xla", "torchao", "torchmetrics", "torchvision", "transformer_engine",
    "transformers", "triton",
)  # fmt: skip
GIT_SECONDS = 10.0  # after which git is given up
FILES_NAMED = 50  # changed files that are listed


def version_of(package: str) -> str:
    """The version of a package that is installed; "unknown" where it isn't known."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """The versions of Python, torch, stratagem, and of the packages that are imported and matter."""
    found = {"stratagem": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
    for name in PACKAGES:
        if name in sys.modules:
            version = getattr(sys.modules[name], "__version__", None)
            found[name] = version if isinstance(version, str) else version_of(name.replace("_", "-"))
    return found


def host() -> dict[str, Any]:
    """The machine and the process; with the job's number where a scheduler has one."""
    found: dict[str, Any] = {
        "name": socket.gethostname(),
        "process": os.getpid(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
    }
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_SERVICE_HOST"):
        if name in os.environ:
            found[name.lower()] = os.environ[name]
    return found


def device_of(device: torch.device) -> dict[str, Any]:
    """Name and memory of a device; of the CPU, the memory of the machine."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return {"name": found.name, "kind": "cuda", "memory_bytes": found.total_memory}
    if device.type == "cpu":
        import psutil

        return {"name": platform.machine(), "kind": "cpu", "memory_bytes": psutil.virtual_memory().total}
    return {"name": device.type, "kind": device.type, "memory_bytes": None}


def program() -> dict[str, Any]:
    """The command line, the directory in which it was given, and the file of the program; None in a session."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "command": shlex.join(getattr(sys, "orig_argv", sys.argv)),
        "directory": os.getcwd(),
        "script": None if main is None else os.path.abspath(main),
    }


class GitLook:
    """Asks git, in a thread of its own, for the commit of the program, since that may take long in a large tree.

    Args:
        directory: of the program.

    Attributes:
        found: ``{"commit": ..., "branch": ..., "is_clean": ..., "changed": [...]}``; None before it is known, and where
            there is no git, or the program isn't in a tree of git's. Files that git doesn't know aren't looked at.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.found: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._look, name="git", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> Mapping[str, Any] | None:
        """Wait so long, at most, and return what was found."""
        self._thread.join(seconds)
        return self.found

    def _look(self) -> None:
        command = ["git", "-C", str(self.directory), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
        quietly = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS, env=quietly,
                stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError):
            return
        if done.returncode == 0:
            self.found = parse_status(done.stdout)


def parse_status(printed: str) -> dict[str, Any] | None:
    """What ``git status --porcelain=v2 --branch`` has printed; None where there is no commit yet."""
    lines = printed.splitlines()
    heads = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch.") and line.count(" ") >= 2)
    commit = heads.get("branch.oid", "(initial)")
    if commit == "(initial)":
        return None
    changed = [line.split("\t")[0].split(" ", 8)[-1] for line in lines if not line.startswith("#")]
    return {
        "commit": commit,
        "branch": heads.get("branch.head"),
        "is_clean": not changed,
        "changed": changed[:FILES_NAMED],
    }
