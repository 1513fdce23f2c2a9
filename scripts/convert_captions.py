"""Turn the captions of a public set, and the images that you fetched of it, into a table; see docs/data.md."""

from dalle.commands.convert_captions import main

if __name__ == "__main__":
    main()
