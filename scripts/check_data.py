"""Report on a dataset before training: contents, bad samples, duplicates."""

from dalle.commands.check_data import main

if __name__ == "__main__":
    main()
