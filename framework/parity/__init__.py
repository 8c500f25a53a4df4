"""Parity: whether a module trains to the same numbers under other strategies, update by update."""
