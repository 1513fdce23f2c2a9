"""Plot the training curves of one or many runs, from their log.jsonl, as one image."""

from dalle.commands.plot import main

if __name__ == "__main__":
    main()
