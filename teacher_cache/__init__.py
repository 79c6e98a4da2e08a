"""The teacher stage and the label store: what both the trainer and the server build on."""
