"""Batches of views and their soft labels."""
