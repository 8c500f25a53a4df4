"""Weights in files of any program: told apart by what they hold, read tensor by tensor, written for another."""
