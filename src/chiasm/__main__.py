"""`python -m chiasm` is the `chiasm` command."""

from chiasm.cli import main

if __name__ == "__main__":
    main()
