"""Entry point of `python -m experiments`."""

from experiments._cli import main

if __name__ == "__main__":
    main()
