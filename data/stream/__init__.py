"""A plan's packs, read, decoded and made into batches ahead of the step that needs them."""
