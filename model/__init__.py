"""Qwen3-VL on Megatron-core modules."""
