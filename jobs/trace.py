"""`python -m jobs.trace` in a checkout is `sae-census trace`."""

from sae_census.cli.trace import main

if __name__ == "__main__":
    main()
