"""`python -m jobs` in a checkout is `sae-census`: it lists the jobs."""

from sae_census.cli import main

main()
