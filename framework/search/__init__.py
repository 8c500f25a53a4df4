"""Hyperparameter search with Optuna: each trial is a run from a fresh start, on one rank or many.

``Fit.hyperparameter_search`` begins a search. Optuna is imported where a search, or a trial of Optuna's, needs it.
"""
