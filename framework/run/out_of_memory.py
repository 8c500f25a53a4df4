"""Whether an error says that memory was asked for and not there."""

import torch

OUT_OF_MEMORY = (
    "out of memory",  # of extensions that raise no class of their own
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",  # on Windows
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
"""What a RuntimeError says, in small letters, that means out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was asked for and not there."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OUT_OF_MEMORY)
