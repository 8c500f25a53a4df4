"""What a person sees of a run: what it is, how it goes, how it ended, and what its module is made of."""
