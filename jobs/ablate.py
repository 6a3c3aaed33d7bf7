"""`python -m jobs.ablate` in a checkout is `sae-census ablate`."""

from sae_census.cli.ablate import main

if __name__ == "__main__":
    main()
