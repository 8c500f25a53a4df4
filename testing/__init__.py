"""What users prove their own set-up with."""
