"""`python -m hfcompress`: the command line."""

from hfcompress.run.cli import main

if __name__ == "__main__":
    main()
