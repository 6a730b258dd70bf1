"""`python -m qbench` is the command line."""

from qbench.cli import main

main()
