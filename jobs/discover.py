"""`python -m jobs.discover` in a checkout is `sae-discover`."""

from sae_census.cli.discover import main

if __name__ == "__main__":
    main()
