"""The page of all precisions, for the documents: ``python -m stratagem.strategies.matrix_page``."""

from ..precision.products import LARGE
from ..precision.registry import ALIASES, PRECISIONS, class_of
from .matrix import MATRIX, PLACEMENTS

PAGE = """\
# Precisions

```python
from stratagem import Fit
from stratagem.precision import FP8, MXFP8, BF16True, FP16Mixed, LostUpdates
```

`Fit(precision=...)` takes one of these words, or an instance with options (`FP16Mixed(growth_interval=500)`,
`BF16True(master_weights=False)`). Changing it changes no line of a module and no checkpoint: any precision resumes from
any other's. Made from `strategies/matrix.py` by `python -m stratagem.strategies.matrix_page > docs/precision.md`.

{numbers}

## Under which strategy

{matrix}

{notes}
"yes" is tested on CPUs: the float8 formats of torchao emulated (`FP8(emulate=True)`, `MXFP8(emulate=True)`). `fp8-te`,
`apex-O1` and `apex-O2` have not run: they need NVIDIA's GPUs and packages, and only what they call is tested.

## What each one promises

* Floating-point parameters and buffers are cast. Integer and complex ones stay, and so do quantized weights.
* In the mixed formats matrix products run in 16 bits and the rest in float32, by torch.autocast, under every strategy.
  In the true ones everything the module computes is in the parameters' dtype: floating-point inputs are cast as they
  come, and 16-bit outputs reach `loss` in float32. A buffer that needs its bits (positions beyond 256 in bfloat16) is
  better computed in forward.
* Under `fsdp1` and `fsdp2` a mixed format gathers in 16 bits what matrix products read, and in float32 what autocast
  leaves there: norms, embeddings, recurrent layers, and whatever is tied to one of these. Forward is then a replica's,
  to the bit (tested on two ranks). A parameter that a layer of another kind holds itself is gathered in float32 unless
  it is a matrix of at least {large:,} numbers, which is taken for one that is multiplied; where such a one is added or
  scaled by instead, its numbers are rounded to 16 bits (by up to 1/256 in bfloat16, 1/2048 in float16).
* `fsdp2` gathers both kinds of a block in one message. `fsdp1` has one dtype for a message: the fewer of the two kinds
  are messages of their own, by layer, and within torch's `nn.TransformerEncoderLayer` everything is in float32. It adds
  the gradients of micro-batches in 16 bits, the others in float32: with gradient accumulation losses differ from a
  replica's by up to 1/128 in bfloat16.
* `deepspeed` computes `bf16-mixed` by its engine's own autocast, and stage 3 gathers everything in float32.
* The float8 formats compute the nn.Linear layers that qualify in float8, forward and backward, and all other products
  in bfloat16 (the table's column): layers whose sizes on their rank are multiples of 16 (`mxfp8`: 32) and whose names
  `skip=` doesn't match; output heads are skipped. Parameters and checkpoints are those of `bf16-mixed`.
* `FP8(all_gather=True)` has FSDP2 gather float8 weights; tensorwise scales, no tensor parallelism.
* The default dtype is never changed, neither at construction nor in forward.
* The true halves step on float32 **master weights** with float32 moments, whatever the optimizer: rounding takes place
  once, from the master weight to the parameter. They live in the optimizer's state, cut as it is cut. A checkpoint
  holds them in the parameters' place, under plain names, so that nothing is lost; `fit.export` writes the 16-bit
  weights. Gradients are summed over micro-batches and ranks in 16 bits, and are float32 from there on.
* What they save is traffic and the memory of activations: with AdamW they keep 16 bytes a parameter, as float32 does.
  `BF16True(master_weights=False)` keeps 8, steps on bfloat16 itself and warns (`LostUpdates`): AdamW at a learning rate
  of 1e-3 never moves a weight of 1 there. It is meant for an optimizer that rounds stochastically.
* Optimizers that move parameters outside of `step()` (schedule-free, LOMO) are refused with master weights.
* float16 scales the loss. An overflow on one rank is an overflow on all: all skip the update and halve the scale, and
  the schedule stays where it was. The scale moves once an update, not once a micro-batch, and is saved.
"""


def page() -> str:
    """Write the text of docs/precision.md."""
    numbers = [
        "| `precision=` | also | parameters | products | reductions | updates | loss scale |",
        "| --- " * 7 + "|",
    ]
    for name in PRECISIONS:
        precision = class_of(name)
        also = ", ".join(f"`{alias}`" for alias, target in ALIASES.items() if target == name)
        dtypes = [
            str(dtype).removeprefix("torch.") if dtype else "as built"
            for dtype in (precision.parameter_dtype, precision.compute_dtype, precision.reduce_dtype)
        ]
        updates = "float32" if precision.master_weights else dtypes[0]
        cells = [f"`{name}`", also, *dtypes, updates, "dynamic" if precision.scales_loss else "none"]
        numbers.append("| " + " | ".join(cells) + " |")
    matrix = ["| | " + " | ".join(PLACEMENTS) + " |", "| --- " * (len(PLACEMENTS) + 1) + "|"]
    reasons = list(dict.fromkeys(why for refused in MATRIX.values() for why in refused.values()))
    for name, refused in MATRIX.items():
        cells = [f"no ({reasons.index(refused[p]) + 1})" if p in refused else "yes" for p in PLACEMENTS]
        matrix.append(f"| `{name}` | " + " | ".join(cells) + " |")
    text = "".join(f"{number}. {why}\n" for number, why in enumerate(reasons, start=1))
    return PAGE.format(numbers="\n".join(numbers), matrix="\n".join(matrix), notes=text, large=LARGE)


if __name__ == "__main__":
    print(page(), end="")
