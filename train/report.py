"""placeholder"""


def write_report(folder, shown):
    import json

    (folder / "predictions.jsonl").write_text(
        "".join(
            json.dumps({"id": p.sample.sample_id, "task": p.sample.task, "text": p.text, "answer": p.sample.answer}) + "\n"
            for p in shown
        )
    )
