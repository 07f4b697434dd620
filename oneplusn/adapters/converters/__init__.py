"""Hold one module per foreign format, into a bundle and out of it."""
