"""`python -m jobs.serve` in a checkout is `sae-census serve`."""

from sae_census.cli.serve import main

if __name__ == "__main__":
    main()
