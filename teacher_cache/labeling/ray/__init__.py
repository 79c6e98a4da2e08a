"""Labeling on a Ray cluster."""
