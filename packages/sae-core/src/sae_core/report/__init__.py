"""Reports as pages of HTML that open anywhere, without a network and without this project."""
