"""The configs of the jobs: plain YAML over the defaults of `pipeline.config`."""
