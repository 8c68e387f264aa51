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
"""What a column can be, and the names that are taken for it where --columns names none."""


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
        **{
            name: meaning
            for name, meaning in RECORD.read.items()
            if name in ("t", "fps", "tools", "objects", "weight", "task")
        },
        "data_source": "meta.source",
        "source": "meta.source",
    },
)
"""The columns of a row, by the names that are taken for them; --columns gives others."""


class HuggingFace:
    """One row a sample: messages if there are any, else a question with its answer, else a caption or a text."""

    keys: ClassVar[tuple[Keys, ...]] = chat_keys(ROW)

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Row groups or record batches."""
        return cut_tables(_files(path, follow_links), size)

    def records(self, where: RowRange) -> Iterator[SourceRecord]:
        """One row after another."""
        return read_table(where)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """A chat or a document."""
        row = draft.open(ROW, by_role(value, options.columns))
        draft.id = row.text(*COLUMNS["id"])
        if source := row.text("data_source", "source"):
            draft.meta["source"] = source
        chat = Chat(row, draft, options.files, COLUMNS["image"], COLUMNS["video"])
        if row.has(*COLUMNS["messages"]):
            chat.fill(row.take(*COLUMNS["messages"]))
        elif isinstance(question := _first(row, "question"), str) and isinstance(
            answer := _first(row, "answer"), str
        ):
            _take(row, "question", "answer")
            chat.fill(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            )
        elif isinstance(text := _first(row, "text"), str):
            _take(row, "text")
            chat.fill_document(text)
        else:
            raise Skip(
                "no text",
                f"no column with one: name it with --columns ROLE=COLUMN; there are {_types(value)}",
            )


def by_role(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the columns of --columns under the name of their role; raises UserError for one that the table lacks.

    Another column of that name is not the one that is meant, and stands aside under a name of its own.
    """
    if unknown := [name for name in columns.values() if name not in row]:
        raise UserError(f"--columns: no column {unknown[0]!r}: there are {', '.join(row)}")
    chosen = {COLUMNS[role][0]: row[name] for role, name in columns.items()}
    aside = {known for role in columns for known in COLUMNS[role]}
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    others = {
        f"{name} (not chosen)" if name in aside else name: value for name, value in rest.items()
    }
    return {**others, **chosen}


def _types(row: Mapping[str, Any]) -> str:
    """The columns of a row and what is in them, for messages."""
    return ", ".join(
        f"{name} ({type(value).__name__})" for name, value in row.items() if value is not None
    )


def _first(row: RecordFields, role: str) -> Any:
    return next((row.value[name] for name in COLUMNS[role] if name in row.value), None)


def _take(row: RecordFields, *roles: str) -> None:
    for role in roles:
        row.take(*COLUMNS[role])


def _files(path: Path, follow_links: bool) -> list[Path]:
    """The table's files in their order."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        raise UserError(
            f"{path} holds the splits {', '.join(splits)}: give the folder of one, like {path / (splits or ['train'])[0]}"
        )
    if not path.is_dir() or "state.json" not in os.listdir(path):
        return table_files(path, (".parquet", ".arrow"), follow_links)
    require_pyarrow()
    try:
        state = read_json(path, "state.json", dict[str, Any])
        listed = checked(
            state.get("_data_files"), list[dict[str, Any]], f"{path / 'state.json'}: _data_files"
        )
        names = [
            checked(one.get("filename"), str, f"{path / 'state.json'}: filename") for one in listed
        ]
    except JsonError as error:
        raise UserError(f"{error}: save the dataset again (save_to_disk)") from None
    return [located(path, name, follow_links) for name in names]
