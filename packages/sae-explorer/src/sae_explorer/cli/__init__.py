"""Commands of sae-explorer."""
