"""YAML only: Hydra finds it as pkg://visionloom.recipes."""
