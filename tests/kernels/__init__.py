"""A package, because passes and kernels of one name have tests of one name."""
