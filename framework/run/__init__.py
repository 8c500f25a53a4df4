"""One run: its plan, where its module comes from and is placed, and all that changes between two updates."""
