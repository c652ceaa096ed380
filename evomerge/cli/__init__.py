"""The command line: one file for each group of commands, errors and exit codes in `main`."""
