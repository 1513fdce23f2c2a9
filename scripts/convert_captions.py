"""Convert the captions of a public dataset and its downloaded images to a table (docs/data.md)."""

from dalle.commands.convert_captions import main

if __name__ == "__main__":
    main()
