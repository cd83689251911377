"""The mechanism: typed weight leaves, the one einsum, path rules, tree splitting."""
