"""Scripts that make the bundled sample and train the bundled model: `python -m training.NAME`."""
