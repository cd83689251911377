"""One file a family: its configuration, its module, its name map."""
