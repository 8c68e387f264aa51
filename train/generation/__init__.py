"""Generation: tokens drawn from a model in its training layout."""
