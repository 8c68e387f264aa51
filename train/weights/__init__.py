"""Weights of a Hugging Face folder and of an adapter into a model in any layout."""
