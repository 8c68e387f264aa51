"""Shards, lengths, plans and packs: everything between a tar file and a PackedBatch."""
