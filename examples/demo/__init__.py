"""``python -m examples.demo``: a run on four ranks that goes on on two, over the curve of one process."""
