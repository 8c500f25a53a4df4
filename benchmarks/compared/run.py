"""What this framework and its peers do with the same data and in the same accidents: rows of docs/compared.md.

    python benchmarks/compared/run.py

Each trial trains the same small network on one or two ranks over gloo, by each contestant that is installed, in
processes of their own. Nothing is timed that a busy machine would change. Peers: ``pip install stratagem[peers]``;
Composer wants another torch, and an environment of its own, in which the same command runs it alone.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import tempfile

import torch
from trials import TRIALS

CONTESTANTS = {
    "stratagem_fit": ("stratagem", "stratagem"),
    "transformers_trainer": ("transformers", "transformers"),
    "lightning_trainer": ("lightning", "lightning"),
    "composer_trainer": ("composer", "mosaicml"),
}


def main() -> None:
    """Run the trials that were asked for, and print what was seen."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(TRIALS), choices=list(TRIALS), help="trials")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, gloo")
    there = [name for name in options.contestants if importlib.util.find_spec(CONTESTANTS[name][0])]
    for name in there:
        print(f"{name}: {CONTESTANTS[name][1]} {importlib.metadata.version(CONTESTANTS[name][1])}")
    for name in options.only:
        trial, fields, meaning = TRIALS[name]
        print(f"\n{name}: {' '.join(str(trial.__doc__).split())} {meaning}")
        for contestant in there:
            with tempfile.TemporaryDirectory() as directory:
                print(f"  {contestant}: {trial(contestant, directory, **fields)}", flush=True)


if __name__ == "__main__":
    main()
