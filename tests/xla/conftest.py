"""The XLA strategy on four devices that one CPU stands for: ``make test-xla``, in an environment of its own."""

import os
import sys
from pathlib import Path

os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed")]  # environments.py, training.py

from stratagem.strategies.xla.client import start  # noqa: E402 (reads what was set)

start()  # before any test computes a gradient on the host
