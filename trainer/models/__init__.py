"""Target networks, heads and transfer modules, pretrained weights."""
