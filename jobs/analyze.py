"""`python -m jobs.analyze` in a checkout is `sae-census analyze`."""

from sae_census.cli.analyze import main

if __name__ == "__main__":
    main()
