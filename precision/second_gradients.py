"""Backwards that have no gradient themselves: one that is to be differentiated is refused, instead of losing a part."""

import torch


def check_first_gradient(what: str, instead: str) -> None:
    """Refuse, within a backward, that its gradients are differentiated. A penalty that goes through them would lack a
    part of its gradient, or all of it, without an error.

    Args:
        what: has no gradients of gradients.
        instead: what to do.

    Raises:
        ValueError: the backward is one of ``create_graph=True``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # what is compiled is refused by torch
        raise ValueError(f"torch.autograd.grad(..., create_graph=True): {what} no gradients of gradients. {instead}")
