"""`python -m jobs.attribute` in a checkout is `sae-census attribute`."""

from sae_census.cli.attribute import main

if __name__ == "__main__":
    main()
