"""The byte-level GPT of gpt.py under DeepSpeed's ZeRO-3, parameters and optimizer in host memory, by a ds_config.json.

    python examples/deepspeed_offload.py               # two ranks on this machine; needs the extra deepspeed
    python examples/deepspeed_offload.py --resume      # goes on from the newest checkpoint
    python examples/deepspeed_offload.py --strategy fsdp2 --resume    # ... under another strategy

Every "auto" in the config is filled from the arguments of Fit; what contradicts them is refused.
"""

import argparse
import math
from pathlib import Path

import torch
from gpt import build, datasets  # the example beside this one
from stratagem import Fit
from stratagem.strategies import Strategy
from stratagem.strategies.deepspeed import DeepSpeed


def parse_options() -> argparse.Namespace:
    """Every option of the run, from the command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT under DeepSpeed.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", default=str(Path(__file__).with_name("ds_config.json")), help="DeepSpeed's config")
    parser.add_argument("--strategy", default="deepspeed", help="another strategy takes no config")
    parser.add_argument("--devices", type=int, default=2, help="processes on this machine")
    parser.add_argument("--precision", default="32-true", help="number format: 32-true or bf16-mixed")
    parser.add_argument("--steps", type=int, default=200, help="updates to train for")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of text in a micro-batch, per device")
    parser.add_argument("--context", type=int, default=128, help="bytes in a window")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--output-dir", default="output/deepspeed", help="where checkpoints and logs go")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output-dir")
    return parser.parse_args()


def main() -> None:
    """Train and evaluate."""
    options = parse_options()
    torch.manual_seed(42)
    train, held_out = datasets(options.context, eval_windows=128)
    strategy: str | Strategy = options.strategy
    if strategy == "deepspeed":
        strategy = DeepSpeed(config=options.config)
    fit = Fit(
        build(options.context, options.layers),
        train_data=train,
        eval_data=held_out,
        strategy=strategy,
        devices=options.devices,
        precision=options.precision,
        output_dir=options.output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        warmup_steps=min(20, options.steps),
        weight_decay=0.1,
        logging_steps=20,
        save_steps=100,
        save_total_limit=2,
    )
    fit.train(resume_from_checkpoint=options.resume)
    bits_per_byte = fit.evaluate()["eval_loss"] / math.log(2)
    fit.export(Path(options.output_dir) / "weights.safetensors")
    if fit.strategy.is_main:
        print(f"held-out loss: {bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
