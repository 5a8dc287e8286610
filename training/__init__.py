"""Scripts that make the bundled sample and train the bundled model; run as `python -m training.…`."""
