"""The names, settings and files of transformers' and peft's Qwen3-VL, both ways."""
