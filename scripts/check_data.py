"""Read all of your data once, before you train: what is in it, what is broken, what is there twice."""

from dalle.commands.check_data import main

if __name__ == "__main__":
    main()
