"""Small datasets from handwritten digits, for every phase of a run."""
