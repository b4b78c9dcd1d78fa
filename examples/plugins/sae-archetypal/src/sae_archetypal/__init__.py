"""Decoder rows are mixtures of data points, for sae-core."""
