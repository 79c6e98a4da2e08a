"""Commands that train and compare."""
