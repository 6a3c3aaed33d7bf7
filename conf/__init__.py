"""The configs of the jobs: plain YAML over the defaults of `sae_census.config`."""
