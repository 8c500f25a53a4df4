"""The byte-level GPT of gpt.py under DeepSpeed's ZeRO-3, parameters and optimizer in host memory, by a ds_config.json.

    python examples/deepspeed_offload.py               # two ranks on this machine; needs the extra deepspeed
    python examples/deepspeed_offload.py --resume      # goes on from the newest checkpoint
    python examples/deepspeed_offload.py --strategy fsdp2 --resume    # ... under another strategy

Every "auto" in the config is filled from the arguments of Fit; what contradicts them is refused.
"""

import math
from pathlib import Path

import gpt  # the example beside this one
from stratagem import Fit, configure


def build(context: int = 128, layers: int = 2) -> gpt.GPT:
    """The model.

    Args:
        context: bytes in a window.
        layers: transformer blocks.
    """
    return gpt.build(context, layers)


def data(context: int = 128) -> tuple[gpt.Windows, gpt.Windows]:
    """Training and held-out windows.

    Args:
        context: bytes in a window.
    """
    return gpt.data(context, eval_windows=128)


ARGUMENTS = {
    "strategy": "deepspeed",
    "strategy.config": str(Path(__file__).with_name("ds_config.json")),
    "devices": 2,
    "output_dir": "output/deepspeed",
    "max_steps": 200,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "warmup_steps": 0.1,  # of the run
    "weight_decay": 0.1,
    "logging_steps": 20,
    "save_steps": 100,
    "save_total_limit": 2,
}
"""What Fit is given, unless the command line or a file says otherwise."""


def main() -> None:
    """Train and evaluate."""
    run = configure(build, data, ARGUMENTS)
    fit = Fit.from_config(run)
    fit.train(resume_from_checkpoint=run.resume)
    bits_per_byte = fit.evaluate()["eval_loss"] / math.log(2)
    fit.export(Path(fit.args.output_dir) / "weights.safetensors")
    if fit.strategy.is_main:
        print(f"held-out loss: {bits_per_byte:.3f} bits per byte")


if __name__ == "__main__":
    main()
