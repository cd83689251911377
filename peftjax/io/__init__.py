"""Readers and writers of the files other people's libraries use."""
