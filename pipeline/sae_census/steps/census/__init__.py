"""From text to a catalog: prepare, analyse a shard, merge, reduce, publish."""
