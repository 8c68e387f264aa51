"""Everything between a tar file and a PackedBatch, in rooms that are read in this order.

::

    tar files ──► shards ──► encode ──► plan ──► stream ──► PackedBatch
                   bytes      tokens    packs     batches    to the model
                     ▲           │         │
       other formats │           └────┬────┘
    convert ─────────┘             inspect, demo

- `config`: which datasets are read, and the rules by which samples become tokens and patches.
- `shards`: a sample on disk: schema, tar, index, manifest, local and remote storage, reading and writing.
- `encode`: from a sample to token ids, loss weights, positions and patches.
- `plan`: from lengths alone: which sample is drawn when, which share a pack, which rank gets it.
- `stream`: a plan's packs, read, decoded and made into batches ahead of the step that needs them.
- `inspect`: samples and packs for people: pages, contact sheets, verification.
- `demo`: small datasets from handwritten digits, for every phase of a run.
- `convert`: other formats into shards.

A room imports from those before it in `shards → encode → plan → stream`; `inspect`, `demo` and `convert` stand on top.
"""
