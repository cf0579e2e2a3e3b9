"""Hyperparameter search over Trainer runs, with Optuna as the engine: the extra ``tune``."""
