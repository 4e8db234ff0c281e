"""The commands of `longreach`, one module each. Every module has what `launch.cli.Command` lists."""
