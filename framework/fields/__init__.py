"""Every option of a run: its field, its type, its range, and what others call it."""
