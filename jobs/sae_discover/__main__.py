"""Run the command."""

from jobs.discover import main

main()
