"""What a run measures: evaluation and metrics, means of losses, tokens, memory, the best so far."""
