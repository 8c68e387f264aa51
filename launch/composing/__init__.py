"""How Hydra composes a run of recipes that strangers wrote and of words that users typed, and what it says when it cannot."""
