"""Crosscoder with latents that belong to one site alone, for sae-core."""
