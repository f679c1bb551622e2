"""`python -m crossguard` is the command `crossguard`."""

from crossguard.cli import main

if __name__ == "__main__":
    main()
