"""Hyperparameter search with Optuna: one run a trial, each from a fresh start, on one rank or many.

``Fit.hyperparameter_search`` is the door. Optuna is imported where a search or a trial of its own asks for it.
"""
