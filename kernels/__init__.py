"""One folder per operation: reference.py is plain torch and the specification of the others."""
