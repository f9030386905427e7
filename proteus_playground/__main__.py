"""`python -m proteus_playground` is `proteus`."""

from proteus_playground.cli.app import main

if __name__ == "__main__":
    main()
