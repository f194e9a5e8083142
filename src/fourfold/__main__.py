"""`python -m fourfold` is the command `fourfold`."""

from fourfold.cli.main import main

if __name__ == "__main__":
    main()
