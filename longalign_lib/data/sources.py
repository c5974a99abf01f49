"""The paper's nine sources on the Hugging Face Hub: where each is, what its columns are called, what its licence says.

Nothing is downloaded whole: `datasets` streams rows. No dataset here needs a loading script (those no longer load) nor
`trust_remote_code`. Where the paper's own corpus may not or cannot be fetched, another stands in and `stand_in` says why.
`verified`: dataset, config, columns and licence were each seen on its card, on a derived set's card, or in public code
that streams it; `note` says where and what was not. No stream was opened over a network when this was written: the code
is tested on local files in the same schemas. Look at a licence yourself before you publish what you built.

Rows come in the order of `hub.ShardedRows`. Drawing among the documents read is `sampling`'s work.
Cost: network; memory of a few row groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import pandas as pd

from longalign_lib.data import hub
from longalign_lib.data.documents import MAX_BYTES, SOURCES, Document, accepting
from longalign_lib.data.text import language_of

PERMISSIVE = (
    "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "artistic-2.0",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One source on the Hub. Columns may be dotted paths into a record ("metadata.license")."""

    name: str  # key of documents.SOURCES
    dataset: str  # Hub id
    config: str | None
    text: str  # column
    language: str
    licence: str  # of the collection, or "per document" with licence_column
    split: str = "train"
    title: str | None = None
    id: str | None = None
    licence_column: str | None = None
    keep: tuple[str, tuple[str, ...]] | None = None  # (column, values): rows with another value are rejected
    stand_in: str = ""  # what it stands in for, and why
    verified: bool = True
    note: str = ""


REGISTRY: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "arxiv", "common-pile/arxiv_papers_filtered", None, "text", "en", "per document: CC BY, CC BY-SA or CC0",
            id="id", licence_column="metadata.license",
            note="304,048 openly licensed papers as plain text; licences on its card, columns in code that reads it",
        ),
        Source(
            "books", "emozilla/pg19", None, "text", "en", "public domain in the US (Project Gutenberg, before 1919)",
            title="short_book_title", id="url", verified=False,
            stand_in="Books3: withdrawn after reported copyright infringement, not to be used. PG-19 is Project Gutenberg's",
            note="PG-19 in Parquet; the card has the columns but no licence. A book has 400,000 characters on average, so "
            "most are longer than 64k tokens: over_long='cut' takes their beginnings",
        ),
        Source(
            "c4", "allenai/c4", "en", "text", "en", "ODC-BY 1.0; Common Crawl's terms of use apply", id="url",
            note="licence on its page, columns url, text, timestamp on the card of the older copy",
        ),
        Source(
            "clue", "HuggingFaceFW/fineweb-2", "cmn_Hani", "text", "zh", "ODC-BY 1.0; Common Crawl's terms of use apply",
            id="id",
            stand_in="CLUECorpus2020: not on the Hub by its authors. This is Common Crawl's Chinese too, as that is",
            note="config in code that streams it, columns and licence on the card of a set derived from it",
        ),
        Source(
            "commoncrawl", "HuggingFaceFW/fineweb", "sample-10BT", "text", "en",
            "ODC-BY 1.0; Common Crawl's terms of use apply", id="id",
            note="config and licence on its card, columns on the card of a set drawn from it",
        ),
        Source(
            "github", "codeparrot/codeparrot-clean-train", None, "content", "en", "per document: the repository's",
            title="path", id="hash", licence_column="license", keep=("license", PERMISSIVE),
            note="Python files, columns on its card; those of permissively licensed repositories are kept",
        ),
        Source(
            "stackexchange", "common-pile/stackexchange_filtered", None, "text", "en", "per document: CC BY-SA",
            id="id", licence_column="metadata.license",
            note="a question with its answers and comments as plain text; licence on the unfiltered set's card, columns in "
            "code that reads it. A few sites are in Spanish, Japanese, Portuguese or Russian",
        ),
        Source(
            "wikipedia", "wikimedia/wikipedia", "20231101.en", "text", "en", "CC BY-SA 3.0 and GFDL",
            title="title", id="url", note="licence on its card, config and columns in code that streams it; 20231101.zh is Chinese",
        ),
        Source(
            "wudao", "Skywork/SkyPile-150B", None, "text", "zh", "Skywork Community License (a file of the dataset)",
            stand_in="WuDaoCorpora: its 200 GB base version needs a login on its makers' site. This is cleaned Chinese web text too",
            note="its card: the only column is text; pages have about 1,000 characters on average, so long ones are rare",
        ),
    )
}  # fmt: skip


def table() -> pd.DataFrame:
    """The registry as a frame, a row a source, to be read."""
    rows = [{"source": s.name, "holds": SOURCES[s.name][0], **asdict(s)} for s in REGISTRY.values()]
    return pd.DataFrame(rows).drop(columns="name")


def get(name: str) -> Source:
    """The source of this name. Raises ValueError with the names there are."""
    if name not in REGISTRY:
        raise ValueError(f"source {name!r} is unknown; accepted: {', '.join(REGISTRY)} (or a folder of your own)")
    return REGISTRY[name]


def documents_of(source: Source, rows: Iterable[dict], rejected: list[dict], cleaned: list[dict] | None = None,
                 max_bytes: int = MAX_BYTES) -> Iterator[Document]:  # fmt: skip
    """Rows of a source as documents; a row without text, with another licence or language is recorded in `rejected`.

    A row without an id gets one from its text, so that it is the same wherever in the stream it stands. Ids seen are not
    remembered here.
    """

    def found() -> Iterator[Document]:
        for row in rows:
            text = _field(row, source.text)
            given = _field(row, source.id) if source.id else None
            identity = f"{source.name}:{_plain(given) or _digest(text)}"
            reason = None
            if not isinstance(text, str):
                columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                reason = f"no text in column {source.text!r} (columns: {columns})"
            elif len(text) > max_bytes:
                reason = f"{len(text):,} characters, the limit for one document is {max_bytes:,}"
            elif source.keep and _field(row, source.keep[0]) not in source.keep[1]:
                reason = f"{source.keep[0]} is {_field(row, source.keep[0])!r}; kept: {', '.join(source.keep[1])}"
            elif text.strip() and (language := language_of(text[:20_000])) != source.language:
                reason = f"its language is {language}, the source's is {source.language}"
            if reason is not None:
                rejected.append({"id": identity, "reason": reason})
                continue
            title = _field(row, source.title) if source.title else None
            licence = _field(row, source.licence_column) if source.licence_column else None
            yield Document(
                identity, text, source.name, source.language, _plain(title), _plain(licence) or source.licence
            )

    yield from accepting(found(), rejected, cleaned, unique=False)


def stream(
    source: Source | str,
    seed: int,
    *,
    rejected: list[dict],
    cleaned: list[dict] | None = None,
    limit: int | None = None,
    ways: int = 8,
    buffer: int = 0,
    loader: Callable | None = None,
) -> Iterator[Document]:
    """Documents of one source, streamed.

    Args:
        source: or its name.
        seed: of the order of shards and of the buffer.
        rejected: gets {"id", "reason"} for every row that is no document.
        cleaned: gets a note for each text that invisible characters were taken from.
        limit: rows to read at most.
        ways: shards read in turn.
        buffer: rows of a shuffle buffer; 0 for none.
        loader: called in place of `datasets.load_dataset`.

    Raises:
        ValueError: an unknown source. hub.SourceError: it cannot be opened, or the network goes away.
    """
    source = get(source) if isinstance(source, str) else source
    rows = hub.open_rows(
        source.dataset, source.config, source.split, seed=seed, ways=ways, rejected=rejected, loader=loader
    )
    limited = islice(hub.reading(source.name, rows), limit)
    yield from documents_of(source, hub.buffered(limited, buffer, seed) if buffer else limited, rejected, cleaned)


def _field(row: dict, path: str):
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _plain(value) -> str:
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _digest(text) -> str:
    return hashlib.sha256(str(text).encode("utf-8", "replace")).hexdigest()[:16]
