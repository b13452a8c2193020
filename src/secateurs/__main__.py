"""``python -m secateurs``, which is the same as ``secateurs``."""

from secateurs.cli import main

if __name__ == "__main__":
    main()
