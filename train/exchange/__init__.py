"""Checkpoints to and from the folders of Hugging Face and PEFT."""
