"""The command line `stree-tune`."""
