"""What a shard is counted with: packing, masks, the aggregation, and labels."""
