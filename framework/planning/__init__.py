"""Planning a run before there is a machine for it: its memory, its messages, its operations, and how fast it can be."""
