"""One file a method; `base` has the protocol and `chain`."""
