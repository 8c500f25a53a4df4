"""What looks after a running rank from a thread of its own: signals, failures of other ranks, hangs."""
