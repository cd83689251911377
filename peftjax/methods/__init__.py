"""One file per method; `base` has the protocol and `chain`, `registry` all of them by name."""
