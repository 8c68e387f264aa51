"""Update rules: AdamW and Muon, as Megatron-core's distributed optimizer takes them."""
