"""`python -m jobs.verify` in a checkout is `sae-census verify`."""

from sae_census.cli.verify import main

if __name__ == "__main__":
    main()
