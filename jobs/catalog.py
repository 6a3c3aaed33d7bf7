"""`python -m jobs.catalog` in a checkout is `sae-census catalog`."""

from sae_census.cli.catalog import main

if __name__ == "__main__":
    main()
