"""What the ``bharat`` command runs, one file a command; ``lightning_bharat.cli`` finds them by name."""
