"""Scripts and configs to copy. ``python -m examples.demo`` runs them one after another."""
