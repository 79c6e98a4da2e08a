"""The views of a sample: augmentation policies and frame sampling."""
