"""knowstore."""
