"""`python -m proteus_playground` is `proteus`."""

from proteus_playground.cli import main

if __name__ == "__main__":
    main()
