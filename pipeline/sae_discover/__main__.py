"""Run the command."""

from sae_census.cli.discover import main

main()
