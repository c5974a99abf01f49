"""Outcomes over kills: nothing is in no file, whatever moment it ends at."""

import pytest

from longalign_lib.data import outcomes as O
from longalign_lib.data.documents import Document
from longalign_lib.data.jsonl import read_jsonl, write_jsonl


def sample(document, question="Why?", answer="Because."):
    messages = [{"role": "user", "content": f"{document.text}\n\n{question}"}, {"role": "assistant", "content": answer}]
    return {"document_id": document.id, "document_hash": O.text_hash(document.text), "messages": messages, "length": 9}


DOCUMENTS = [Document(f"d{i}", f"Text number {i}.", "books", "en") for i in range(3)]


def everything(folder):
    return {r["document_id"] for name in O.FILES if (folder / name).is_file() for r in read_jsonl(folder / name, [])}


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_stop_at_any_write_of_the_end_loses_no_outcome(tmp_path, monkeypatch, stop_at):
    first = O.Outcomes(tmp_path, DOCUMENTS[1:])
    first.add(sample(DOCUMENTS[1]))
    first.add(sample(DOCUMENTS[2], "Who?", "Nobody."))
    assert len(first.settle(3).samples) == 2
    second = O.Outcomes(tmp_path, DOCUMENTS)  # d0 comes first now, and d1 repeats it
    second.add(sample(DOCUMENTS[0]))
    writes = [0]

    def write(path, records):
        writes[0] += 1
        if writes[0] > stop_at:
            raise KeyboardInterrupt
        return write_jsonl(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(O, "write_jsonl", write)
        if stop_at < 2:
            with pytest.raises(KeyboardInterrupt):
                second.settle(3)
            assert everything(tmp_path) == {"d0", "d1", "d2"}
    built = O.Outcomes(tmp_path, DOCUMENTS).settle(3)
    assert [s["document_id"] for s in built.samples] == ["d0", "d2"] and [r["document_id"] for r in built.rejected] == ["d1"]
    assert everything(tmp_path) == {"d0", "d1", "d2"} and not (tmp_path / O.FILES[2]).exists()
