"""`python -m jobs.compare` in a checkout is `sae-census compare`."""

from sae_census.cli.compare import main

if __name__ == "__main__":
    main()
