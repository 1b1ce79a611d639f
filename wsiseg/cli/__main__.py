"""`python -m wsiseg.cli` is `wsiseg`."""

from wsiseg.cli import main

main()
