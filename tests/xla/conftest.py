"""The XLA strategy on four devices that one CPU stands for: ``make test-xla``, in an environment of its own."""

import os
import sys
from pathlib import Path

os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))  # training.py

from stratagem.strategies.xla import start

start()  # before any test computes a gradient on the host
