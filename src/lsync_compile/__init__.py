"""lsync-compile: a ``torch.compile`` backend and runtime for LatentSync."""

__version__ = "0.1.0"
