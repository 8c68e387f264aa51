"""Converters: other formats become shards of this project's schema; one file for each source format."""
