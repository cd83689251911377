"""Our time and memory against a peer's, each in its own process, turn by turn."""
