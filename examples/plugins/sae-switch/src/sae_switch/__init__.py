"""A router sends each row to one of several small dictionaries, for sae-core."""
