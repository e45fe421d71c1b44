"""The programs of the system, one folder each."""
