"""Training methods besides SSKT."""
