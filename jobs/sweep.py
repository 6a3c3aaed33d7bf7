"""`python -m jobs.sweep` in a checkout is `sae-census sweep`."""

from sae_census.cli.sweep import main

if __name__ == "__main__":
    main()
