"""Say what a checkpoint is, of this library or another, without running anything that is in it."""

from dalle.commands.inspect_checkpoint import main

if __name__ == "__main__":
    main()
