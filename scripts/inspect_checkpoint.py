"""Report what a checkpoint contains, of this library or another, without running its code."""

from dalle.commands.inspect_checkpoint import main

if __name__ == "__main__":
    main()
