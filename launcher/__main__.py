"""`python -m launcher` is `sftlaunch`."""

from launcher.cli import main

if __name__ == "__main__":
    main()
