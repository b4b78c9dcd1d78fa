"""{{ what }} for sae-core."""
