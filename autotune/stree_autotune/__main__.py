"""`python -m stree_autotune`: the command line, as launchers of several processes start it."""

from stree_autotune.cli import main

main()
