"""Configuration: a run's arguments from files and from the command line, and the file that a run leaves of its own."""
