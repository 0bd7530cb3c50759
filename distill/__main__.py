"""`python -m xeco_distill`, as torchrun starts it."""

from xeco_distill.cli import main

main()
