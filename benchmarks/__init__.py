"""Figures that matter, as ratios against the raw engine or a peer in the same run. `make bench` runs all of them."""
