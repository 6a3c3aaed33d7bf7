"""`python -m jobs.status` in a checkout is `sae-census status`."""

from sae_census.cli.status import main

if __name__ == "__main__":
    main()
