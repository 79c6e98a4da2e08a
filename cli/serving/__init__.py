"""Commands of the label server."""
