"""Reading caches over HTTP from a label server."""
