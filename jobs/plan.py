"""`python -m jobs.plan` in a checkout is `sae-census plan`."""

from sae_census.cli.plan import main

if __name__ == "__main__":
    main()
