"""`python -m sarm`."""

from sarm.cli import main

main()
