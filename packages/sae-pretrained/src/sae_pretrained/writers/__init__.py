"""Writers of other libraries' formats, one a file; `sae_core.format.express` has what they share."""
