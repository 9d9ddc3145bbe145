"""`python -m stree_autotune`: the command line, as launchers of several processes start it."""

from stree_autotune.cli.commands import main

main()
