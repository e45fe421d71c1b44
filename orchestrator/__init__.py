"""The control plane: membership and topology, never on the token path."""
