"""Several processes that open and index the same set at once (dalle/data/sources/index.py)."""

import multiprocessing
import os
from pathlib import Path

import pytest

from dalle.data.sources import open_source
from dalle.data.sources.index import FOLDER
from tests.helpers.formats import COUNT, caption, csv_file, tars

PROCESSES = 4
ROUNDS = 6


def opening(path: Path, start, out) -> None:
    """Opens a set at the same moment as the others, reads all of it, and tells what it found."""
    for number in range(ROUNDS):
        start.wait(60)
        try:
            source = open_source(path, index_dir=path.parent / f"index-{number}")
            said = (
                source.hash,
                [source.captions(i)[0] for i in range(len(source))],
                str(source._index.folder),
            )
        except Exception as error:
            said = repr(error)
        out.put((number, said))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
@pytest.mark.parametrize("damaged", [False, True], ids=["new", "damaged"])
@pytest.mark.parametrize("form", [tars, csv_file])
def test_processes_that_index_a_set_at_once_end_with_one_index(tmp_path, form, damaged):
    (tmp_path / "set").mkdir()
    path = form(tmp_path / "set")
    source = open_source(path, index_dir=tmp_path / "first")
    if damaged:
        for number in range(ROUNDS):
            folder = path.parent / f"index-{number}" / source._index.folder.name
            folder.mkdir(parents=True)
            (folder / "meta.json").write_text('{"sizes": {"samp')
    context = multiprocessing.get_context("fork")
    start, out = context.Barrier(PROCESSES), context.Queue()
    processes = [context.Process(target=opening, args=(path, start, out)) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = [out.get(timeout=60) for _ in range(PROCESSES * ROUNDS)]
    for process in processes:
        process.join(60)
    for number in range(ROUNDS):
        index = path.parent / f"index-{number}" / source._index.folder.name
        expected = (source.hash, [caption(i)[0] for i in range(COUNT)], str(index))
        assert [said for which, said in found if which == number] == [expected] * PROCESSES
        assert os.listdir(index.parent) == [index.name]  # and nothing half made is left
    assert not (path.parent / FOLDER).exists()
