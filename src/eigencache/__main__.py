"""`python -m eigencache` is the command line."""

from eigencache.cli.app import main

main()
