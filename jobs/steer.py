"""`python -m jobs.steer` in a checkout is `sae-census steer`."""

from sae_census.cli.steer import main

if __name__ == "__main__":
    main()
