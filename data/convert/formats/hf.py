"""Hugging Face datasets on disk: a folder by `save_to_disk`, or parquet files; columns are named by --columns.

Pictures are columns of bytes, of {"bytes", "path"} objects (as the library stores its Image feature), or of file names.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, checked, read_json
from visionloom.data.convert.chat_keys import RECORD, chat_keys
from visionloom.data.convert.chats import Chat
from visionloom.data.convert.keys import Keys, RecordFields
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions, SourceRecord
from visionloom.data.convert.source_files import located
from visionloom.data.convert.tables import (
    RowRange,
    cut_tables,
    read_table,
    require_pyarrow,
    table_files,
)
from visionloom.data.shards.write_parts import SourcePart

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("image", "images", "jpg", "png"),
    "video": ("video", "videos", "mp4"),
    "text": ("text", "caption"),
    "messages": ("messages", "conversations"),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "response"),
    "system": ("system", "system_prompt"),
    "id": ("id", "key", "__key__"),
}
"""The roles of a column, and the names that are taken for each where --columns names none."""
_SHARED: Final = ("t", "fps", "tools", "objects", "weight", "task")
"""Keys that a row has in common with a record of the chat formats."""


MEANINGS: Final[Mapping[str, str]] = {
    "image": "pictures",
    "video": "videos",
    "text": "caption or text, with placeholders",
    "messages": "turns, a list or JSON text",
    "question": "user turn, with placeholders",
    "answer": "assistant turn",
    "system": "system turn",
    "id": "id of the sample",
}
ROW: Final = Keys(
    "record",
    {
        **{name: MEANINGS[role] for role, names in COLUMNS.items() for name in names},
        **{name: meaning for name, meaning in RECORD.read.items() if name in _SHARED},
        "data_source": "meta.source",
        "source": "meta.source",
    },
)
"""The columns of a row, by the names that are taken for them; --columns gives others."""


class HuggingFace:
    """One row a sample: messages if there are any, else a question with its answer, else a caption or a text."""

    keys: ClassVar[tuple[Keys, ...]] = chat_keys(ROW)

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield row groups or record batches."""
        return cut_tables(_files(path, follow_links), size)

    def records(self, where: RowRange) -> Iterator[SourceRecord]:
        """Yield one row after another."""
        return read_table(where)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a chat or a document; raises Skip."""
        row = draft.open(ROW, by_role(value, options.columns))
        draft.id = row.text(*COLUMNS["id"])
        source = row.text("data_source", "source")
        if source:
            draft.meta["source"] = source

        chat = Chat(row, draft, options.files, COLUMNS["image"], COLUMNS["video"])
        if row.has(*COLUMNS["messages"]):
            chat.fill(row.take(*COLUMNS["messages"]))
            return
        # Messages say more than a question, a question more than a text.
        question, answer, text = (_text(row, role) for role in ("question", "answer", "text"))
        if question is not None and answer is not None:
            _take(row, "question", "answer")
            turns = [{"role": "user", "content": question}]
            chat.fill([*turns, {"role": "assistant", "content": answer}])
        elif text is not None:
            _take(row, "text")
            chat.fill_document(text)
        else:
            # With their types: a column of another name, or of no text, is the usual reason.
            there = [
                f"{name} ({type(one).__name__})" for name, one in value.items() if one is not None
            ]
            fix = "name it with --columns ROLE=COLUMN"
            raise Skip("no text", f"no column with one: {fix}; there are {', '.join(there)}")


def by_role(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with the columns of --columns under the name of their role; raises UserError for one that it lacks.

    Another column of that name is not the one that is meant, and gets a name of its own.
    """
    for name in columns.values():
        if name not in row:
            raise UserError(f"--columns: no column {name!r}: there are {', '.join(row)}")

    not_meant = {name for role in columns for name in COLUMNS[role]}
    named: dict[str, Any] = {}
    for name, value in row.items():
        if name not in columns.values():
            named[f"{name} (not chosen)" if name in not_meant else name] = value
    for role, name in columns.items():
        named[COLUMNS[role][0]] = row[name]
    return named


def _text(row: RecordFields, role: str) -> str | None:
    """Return the text of the first column that there is for a role; None if that holds no text."""
    for name in COLUMNS[role]:
        if name in row.value:
            value = row.value[name]
            return value if isinstance(value, str) else None
    return None


def _take(row: RecordFields, *roles: str) -> None:
    for role in roles:
        row.take(*COLUMNS[role])


def _files(path: Path, follow_links: bool) -> list[Path]:
    """Return the table's files in their order; raises UserError."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        one = path / (splits or ["train"])[0]
        problem = f"{path} holds the splits {', '.join(splits)}"
        raise UserError(f"{problem}: give the folder of one, like {one}")
    # The order of the files is that of state.json, not of their names.
    if not path.is_dir() or "state.json" not in os.listdir(path):
        return table_files(path, (".parquet", ".arrow"), follow_links)

    require_pyarrow()
    names = _names_in_state(path)
    return [located(path, name, follow_links) for name in names]


def _names_in_state(path: Path) -> list[str]:
    """Return the names of the files that a saved dataset's state.json lists; raises UserError."""
    where = f"{path / 'state.json'}:"
    names: list[str] = []
    try:
        state = read_json(path, "state.json", dict[str, Any])
        files = checked(state.get("_data_files"), list[dict[str, Any]], f"{where} _data_files")
        for file in files:
            names.append(checked(file.get("filename"), str, f"{where} filename"))
    except JsonError as error:
        raise UserError(f"{error}: save the dataset again (save_to_disk)") from None
    return names
