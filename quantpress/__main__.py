"""Entry point of `python -m quantpress`."""

from quantpress.pipelines.cli import main

if __name__ == "__main__":
    main()
