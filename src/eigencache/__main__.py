"""Run the command line: `python -m eigencache`."""

from eigencache.cli.app import main

main()
