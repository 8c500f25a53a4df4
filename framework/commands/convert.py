"""``stratagem convert``: writes weights of one format in another."""

import argparse
import sys
from pathlib import Path

from ..printing import say

TARGETS = ("safetensors", "torch", "dcp", "transformers")


def add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand ``stratagem convert``."""
    parser = commands.add_parser(
        "convert",
        help="write weights of another program's format, or of a checkpoint, in the format that a program reads",
        description=(
            "Read weights (a file of torch.save, a Lightning checkpoint, a safetensors file, a directory of "
            "torch.distributed.checkpoint or of a transformers model, or a checkpoint of stratagem) and write them in "
            "another format. What the source is, is told by what it holds; no code in it is run. One tensor is in "
            "memory at a time. A checkpoint of a run is no target: begin a run from weights by fit.load_weights(path)."
        ),
        epilog='Example: stratagem convert epoch=3.ckpt weights.safetensors --rename "model.*=*" --dtype bfloat16',
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a file or a directory")
    parser.add_argument("target", metavar="TARGET", type=Path, nargs="?", help="the file or directory to write")
    # Not choices=: what can't be a target is refused with what to do instead.
    parser.add_argument(
        "--to", metavar="FORMAT", help=f"{', '.join(TARGETS)} (default: as the target's ending says: .safetensors, .pt)"
    )
    parser.add_argument("--dtype", help="of floating-point tensors: float32, float16, bfloat16 (default: as they are)")
    parser.add_argument(
        "--rename", action="append", default=[], metavar="OLD=NEW",
        help='other names for tensors; * stands for any text: "model.*=*" takes a prefix off. May be given again',
    )  # fmt: skip
    parser.add_argument(
        "--leave-out", action="append", default=[], metavar="PATTERN", help="tensors to leave out. May be given again"
    )
    parser.add_argument("--key", help="where the weights are in a torch.save file or DCP directory: ema.model")
    parser.add_argument(
        "--config", type=Path, metavar="PATH",
        help="for a transformers directory: the directory of the model that was fine-tuned, or its config.json",
    )  # fmt: skip
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of its files (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace a target that is there")
    parser.add_argument("--show", action="store_true", help="list the tensors, with their new names, and write nothing")
    parser.set_defaults(run=run_convert, parser=parser)


def run_convert(options: argparse.Namespace) -> int:
    """Run ``stratagem convert``.

    Returns:
        0 where the target was written, else 1.
    """
    if options.target is None and not options.show:
        options.parser.error("TARGET is missing: the file or directory to write (or --show)")
    try:
        show(options) if options.show else write(options)
    except (ValueError, OSError) as error:
        print(f"stratagem convert: {error}", file=sys.stderr)
        return 1
    return 0


def show(options: argparse.Namespace) -> None:
    """List the tensors of the source."""
    from ..weights.names import renamed
    from ..weights.opening import open_weights

    found = renamed(open_weights(options.source.expanduser(), options.key), options.rename, options.leave_out)
    for name, source in found.tensors.items():
        say(f"{name}  {str(source.dtype).removeprefix('torch.')}  {list(source.shape)}")
    for name, first in found.tied.items():
        say(f"{name}  = {first}")


def write(options: argparse.Namespace) -> None:
    """Convert, and print what was written."""
    from ..weights.converting import convert

    done = convert(
        options.source, options.target, options.to,
        dtype=options.dtype, rename=options.rename, leave_out=options.leave_out, key=options.key,
        config=options.config, shard_size=options.shard_size, force=options.force,
    )  # fmt: skip
    say(f"{done.path}: {done.tensors} tensors, {done.bytes:,} bytes ({done.source_format} to {done.format})")
    if done.left_out:
        more = f" and {len(done.left_out) - 8} more" if len(done.left_out) > 8 else ""
        say(f"Left out: {', '.join(done.left_out[:8])}{more}")
