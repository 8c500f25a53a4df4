"""What ``torch_compile`` may ask for, and which arguments leave an update that can't be one program."""

from .accumulation import NAME as SCHEDULE
from .argument_fields import ArgumentFields

UPDATE = "update"
"""The value of ``torch_compile`` that asks for an update as one program."""

NEEDED_FOR_UPDATE = "2.13"
"""The torch that it was tried with; 2.9 compiles no optimizer's step on the CPU."""

BACKENDS = ("inductor", "aot_eager")
"""What can compile it; the second runs the graph's operations one by one, to tell the compiler's faults from others."""

OUTSIDE_ONE_PROGRAM = {  # argument: (its value that asks for nothing, why one program can't do the other)
    "gradient_accumulation_steps": (1, "makes an update of several micro-batches, and the program has one"),
    SCHEDULE: ({}, "makes an update of several micro-batches, and the program has one"),
    "auto_find_batch_size": (False, "makes an update of several micro-batches where memory runs out"),
    "spike_updates": (None, "has the host judge the norm between gradients and step"),
    "gradient_checkpointing": (False, "has no effect where the compiler chooses what is computed again"),
    "contrastive_chunks": (None, "computes a micro-batch in pieces, twice each, and the program has one forward"),
    "past_index": (-1, "hands an output of one update on to the next"),
    "debug": ("", "looks at layers one by one, which are fused"),
}


def problems(args: ArgumentFields) -> list[tuple[str, str]]:
    """Return (field, why it can't work and what to write instead) for every field that can't go with ``torch_compile``
    as it is.
    """
    if isinstance(args.torch_compile, str) and args.torch_compile != UPDATE:
        return [("torch_compile", f"must be True, False or {UPDATE!r}")]
    if args.torch_compile != UPDATE:
        return []
    found = [
        (name, f"{why}, while torch_compile={UPDATE!r} is set. Write torch_compile=True, or leave {name} out")
        for name, (nothing, why) in OUTSIDE_ONE_PROGRAM.items()
        if getattr(args, name) != nothing
    ]
    if args.torch_compile_backend not in (None, *BACKENDS):
        found.append(("torch_compile_backend", f"must be one of {', '.join(BACKENDS)} with torch_compile={UPDATE!r}"))
    return found
