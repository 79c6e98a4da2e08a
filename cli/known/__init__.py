"""Commands that list what is known by name."""
