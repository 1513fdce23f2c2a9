"""Generates images for a prompt: see dalle/commands/sample.py."""

from dalle.commands.sample import main

if __name__ == "__main__":
    main()
