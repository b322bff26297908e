"""Entry point of `python -m subspace_jax.cli`."""

from ._main import main

if __name__ == "__main__":
    main()
