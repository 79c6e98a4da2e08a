"""The HTML pages: status and sample browser."""
