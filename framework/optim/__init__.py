"""Optimizers and schedules: by name, from packages, of the module's own, and what each can't do."""
