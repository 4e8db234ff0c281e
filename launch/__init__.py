"""The command line and the entry points of the launchers."""
