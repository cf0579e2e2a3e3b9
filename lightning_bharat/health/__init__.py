"""What can go wrong in a run, and how it is seen: one detector a file. Knows torch, not Lightning.

``callbacks.HealthMonitor`` plugs them into a Trainer.
"""
