"""Training a target network from stored soft labels (SSKT)."""
