"""Web page that generates images for captions, ranks them and completes uploaded ones."""

from dalle.commands.app import main

if __name__ == "__main__":
    main()
