"""Target datasets: the known ones, folders, manifests."""
