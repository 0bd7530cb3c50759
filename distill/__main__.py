"""`python -m xeco_distill`, as torchrun starts it."""

from .cli import main

main()
