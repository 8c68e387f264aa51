"""A sample on disk: schema, tar, index, manifest, storage, random access, and writing."""
