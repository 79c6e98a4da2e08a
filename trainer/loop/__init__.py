"""Setting up and running a training."""
