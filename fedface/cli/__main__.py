"""`python -m fedface.cli`, the same as `fedface`."""

from fedface.cli import main

if __name__ == "__main__":
    main()
