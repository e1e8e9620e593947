"""`python -m titan_cli`."""

from titan_cli.main import main

if __name__ == "__main__":
    main()
