"""The verbs of the command line, one file each; a verb imports only what it needs, inside its function."""
