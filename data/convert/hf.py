"""Hugging Face datasets on disk: a folder by `save_to_disk`, or parquet files; columns are named by --columns.

Pictures are columns of bytes, of {"bytes", "path"} objects (as the library stores its Image feature), or of file names.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.data.convert.chats import Chat
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft, Options, Record
from visionloom.data.convert.tables import Rows, cut_tables, decoded, read_table, table_files
from visionloom.data.convert.videos import add_video
from visionloom.data.sample import Image, Message, Text, Video
from visionloom.data.write_parts import Part
from visionloom.parallel.errors import UserError

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("image", "images", "jpg", "png"),
    "video": ("video", "videos", "mp4"),
    "text": ("text", "caption"),
    "messages": ("messages", "conversations"),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "response"),
    "id": ("id", "key", "__key__"),
}
"""What a column can be, and the names that are taken for it where --columns names none."""


class HuggingFace:
    """One row a sample: messages if there are any, else a question with its answer, else a caption or a text."""

    def parts(self, path: Path, size: int) -> Iterator[Part]:
        """Row groups or record batches."""
        return cut_tables(_files(path), size)

    def records(self, where: Rows) -> Iterator[Record]:
        """One row after another."""
        return read_table(where)

    def convert(self, value: Any, draft: Draft, options: Options) -> None:
        """A chat or a document."""
        row = by_role(value, options.columns)
        draft.id = str(row["id"]) if isinstance(row.get("id"), str | int) else None
        images, videos = _list(row.get("image")), _list(row.get("video"))
        if row.get("messages") is not None:
            record = {**value, "image": None, "images": images, "video": None, "videos": videos}
            Chat(record, draft, options.files).fill(decoded(row["messages"]))
            return
        media: list[Image | Video] = [draft.image(options.files.read(one)) for one in images]
        media += [add_video(draft, options.files, one, {}) for one in videos]
        question, answer, text = row.get("question"), row.get("answer"), row.get("text")
        if isinstance(question, str) and isinstance(answer, str):
            draft.messages = [Message("user", (*media, Text(question))), Message("assistant", (Text(answer),))]
        elif isinstance(text, str) and text.strip():
            draft.content = [*media, Text(text)]
        else:
            raise Skip("no text", f"columns {', '.join(value)}: name the right one with --columns text=NAME")


def by_role(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The values of a row by what they are; raises UserError for a column of --columns that the table lacks."""
    if unknown := [name for name in columns.values() if name not in row]:
        raise UserError(f"--columns: no column {unknown[0]!r}: there are {', '.join(row)}")
    found = {role: row.get(columns[role]) for role in columns}
    for role, names in COLUMNS.items():
        if role not in found:
            found[role] = next((row[name] for name in names if row.get(name) is not None), None)
    return found


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _files(path: Path) -> list[Path]:
    """The table's files in their order."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        raise UserError(f"{path} holds the splits {', '.join(splits)}: give the folder of one, like {path / splits[0]}")
    if (path / "state.json").is_file():
        listed = json.loads((path / "state.json").read_bytes())["_data_files"]
        return [file for one in listed for file in table_files(path / one["filename"], (".arrow",))]
    return table_files(path, (".parquet", ".arrow"))
