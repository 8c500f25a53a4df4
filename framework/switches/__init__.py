"""What one argument switches on: changes to the module's blocks, callbacks, and settings of torch."""
