"""`python -m pitstop` is `pitstop`."""

from pitstop.cli import main

if __name__ == "__main__":
    main()
