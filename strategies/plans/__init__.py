"""Tensor-parallel plans: how each layer is cut over ranks, and which gradients must be summed for it."""
