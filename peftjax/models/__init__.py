"""One file per family: its configuration, its module, its name map."""
