"""Files of a store: blobs, Zarr arrays, Parquet tables and their schemas."""
