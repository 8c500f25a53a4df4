"""Faults of a process: it is killed, stopped, told to end, late, out of memory, or out of step with the others."""

import contextlib
import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from .fault import Fault, Where


class SignalSelf(Fault):
    """Sends a signal to this process, as a scheduler does before it takes a machine away.

    Args:
        number: of the signal: ``signal.SIGTERM``.
        **where: see Fault.

    Example:
        ``SignalSelf(signal.SIGTERM, rank=1, update=6, phase="forward")``
    """

    def __init__(self, number: int, **where: Unpack[Where]) -> None:
        super().__init__(**where)
        self.number = signal.Signals(number)

    def strike(self, fit: Any) -> None:
        """Send the signal. What a handler does with it happens when Python comes to it."""
        os.kill(os.getpid(), self.number)


class SignalLauncher(SignalSelf):
    """Sends a signal to the process that started this one: Fit's launcher, or torchrun's agent.

    Args:
        number: of the signal.
        **where: see Fault.

    Example:
        ``SignalLauncher(signal.SIGTERM, rank=1, update=6)``
    """

    def strike(self, fit: Any) -> None:
        """Send the signal."""
        os.kill(os.getppid(), self.number)


class Kill(SignalSelf):
    """Kills this process by SIGKILL, as the kernel does where memory has run out.

    Example:
        ``Kill(rank=1, update=6, phase="backward")``
    """

    def __init__(self, **where: Unpack[Where]) -> None:
        super().__init__(signal.SIGKILL, **where)


class Stop(SignalSelf):
    """Stops this process by SIGSTOP: it is there, and does nothing. SIGCONT has it go on.

    Example:
        ``Stop(rank=0, update=6, phase="save")``
    """

    def __init__(self, **where: Unpack[Where]) -> None:
        super().__init__(signal.SIGSTOP, **where)


class Exit(Fault):
    """Ends this process at once, with a status and without a word, as a crash in a library does.

    Args:
        status: of the process.
        **where: see Fault.
    """

    def __init__(self, status: int = 3, **where: Unpack[Where]) -> None:
        super().__init__(**where)
        self.status = status

    def strike(self, fit: Any) -> None:
        """End, without Python's clean-up. What was printed before is written."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.status)


class Delay(Fault):
    """Sleeps: a straggler where it is short, a hang where it is long.

    Args:
        seconds: that the rank sleeps each time.
        **where: see Fault.

    Example:
        ``Delay(0.2, rank=1, update=None, phase="data")``: rank 1 waits for its data in each update.
    """

    def __init__(self, seconds: float, **where: Unpack[Where]) -> None:
        super().__init__(**where)
        self.seconds = seconds

    def strike(self, fit: Any) -> None:
        """Sleep."""
        time.sleep(self.seconds)


class Raise(Fault):
    """Raises an exception.

    Args:
        error: the exception, or its class.
        **where: see Fault.

    Example:
        >>> fault = Raise(ValueError("a bad row"), update=2, phase="data")
        >>> Fit(Regressor(), dataset, callbacks=[fault], loggers=(), save_strategy="no", progress=False).train()
        Traceback (most recent call last):
        ...
        ValueError: a bad row
    """

    def __init__(self, error: BaseException | type[BaseException], **where: Unpack[Where]) -> None:
        super().__init__(**where)
        self.error = error

    def strike(self, fit: Any) -> None:
        """Raise it."""
        raise self.error


class OutOfMemory(Raise):
    """Raises what torch raises where a device has no more memory.

    Example:
        ``OutOfMemory(rank=1, update=6, phase="backward")``
    """

    def __init__(self, **where: Unpack[Where]) -> None:
        super().__init__(torch.OutOfMemoryError("out of memory, by stratagem.testing.faults"), **where)


class MismatchedCollective(Fault):
    """Has the chosen ranks do alone what all must do together, as a callback does that asks ``if fit.is_main``.

    Args:
        call: "save" (``fit.save_checkpoint()``), "evaluate" (``fit.evaluate()``), "export" (``fit.export()``, into
            ``output_dir``), "barrier", or "all_reduce".
        **where: see Fault; the default phase is "end".

    Example:
        ``MismatchedCollective("evaluate", rank=0, update=6)``
    """

    CALLS = "save", "evaluate", "export", "barrier", "all_reduce"

    def __init__(self, call: str = "save", **where: Unpack[Where]) -> None:
        if call not in self.CALLS:
            raise ValueError(f"call takes one of {', '.join(map(repr, self.CALLS))}. Received: {call!r}")
        where.setdefault("phase", "end")
        super().__init__(**where)
        self.call = call

    def strike(self, fit: Any) -> None:
        """Begin what the others don't."""
        if self.call == "save":
            fit.save_checkpoint()
        elif self.call == "evaluate":
            fit.evaluate()
        elif self.call == "export":
            fit.export(f"{fit.args.output_dir}/alone.safetensors")
        elif self.call == "barrier":
            fit.strategy.barrier()
        else:
            dist.all_reduce(torch.ones(3, device=fit.strategy.device))


class Within(Fault):
    """Enters a context, and leaves it when training ends: a disk that is full from an update on.

    Args:
        context: a context manager, such as FullDisk.
        **where: see Fault.

    Example:
        ``Within(FullDisk("runs/a"), rank=0, update=6)``
    """

    def __init__(self, context: contextlib.AbstractContextManager[Any], **where: Unpack[Where]) -> None:
        super().__init__(**where)
        self.context = context

    def strike(self, fit: Any) -> None:
        """Enter the context."""
        self._undo.enter_context(self.context)
