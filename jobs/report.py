"""`python -m jobs.report` in a checkout is `sae-census report`."""

from sae_census.cli.report import main

if __name__ == "__main__":
    main()
