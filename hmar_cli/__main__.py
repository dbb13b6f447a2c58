"""`python -m hmar_cli`: the same as the `hmar` command."""

from hmar_cli.app import main

if __name__ == "__main__":
    main()
