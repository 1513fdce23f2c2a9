"""Plot the training curves of one or more runs as one image."""

from dalle.commands.plot import main

if __name__ == "__main__":
    main()
