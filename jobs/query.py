"""`python -m jobs.query` in a checkout is `sae-census query`."""

from sae_census.cli.query import main

if __name__ == "__main__":
    main()
