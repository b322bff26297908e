"""Entry point of `python -m experiments`."""

from experiments.runner import main

if __name__ == "__main__":
    main()
