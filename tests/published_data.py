"""Small parquet files in the columns and types of the published benchmarks."""

import io
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, List, Value
from PIL import Image

LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."


def image(index: int, size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    """An image of its own colour, as the hub stores it."""
    stream = io.BytesIO()
    Image.new("RGB", size, (40 * index % 256, 200, 90)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{index}.png"}


def write(folder: Path, rows: list[dict[str, Any]], features: dict[str, Any], file: str) -> Path:
    """Rows as a parquet file of these features; returns the folder."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    data_set(rows, features).to_parquet(str(folder / file))
    return folder


def data_set(rows: list[dict[str, Any]], features: dict[str, Any]) -> Dataset:
    """The rows in memory; columns that a row does not have are empty."""
    columns = {name: [row.get(name) for row in rows] for name in features}
    return Dataset.from_dict(columns, features=Features(features))


STRING, IMAGE = Value("string"), datasets.Image()
MME_FILE = "data/test-00000-of-00001-a25dbe3b44c4fda6.parquet"
MME = {"question_id": STRING, "image": IMAGE, "question": STRING, "answer": STRING, "category": STRING}


def mme_rows() -> list[dict[str, Any]]:
    """Three images: two of perception (count), one of cognition."""
    images = [("count", "count/1.png"), ("count", "count/2.png"), ("code_reasoning", "code_reasoning/0020.png")]
    return [
        {
            "question_id": name,
            "image": image(index),
            "question": f"Is it {index} {answer}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for index, (category, name) in enumerate(images)
        for answer in ("Yes", "No")
    ]


MMMU_FILE = "data/validation-00000-of-00001.parquet"
_MMMU_TEXTS = ["id", "question", "options", "explanation", "img_type", "answer", "topic_difficulty", "question_type"]
MMMU = {
    **dict.fromkeys(_MMMU_TEXTS, STRING),
    **{f"image_{number}": IMAGE for number in range(1, 8)},
    "subfield": STRING,
}


def mmmu_rows() -> list[dict[str, Any]]:
    """A choice about one image, one whose options are images, open questions for a number and for a word."""

    def row(name: str, question: str, options: str, answer: str, *images: int) -> dict[str, Any]:
        return {
            "id": f"validation_{name}",
            "question": question,
            "options": options,
            "answer": answer,
            "question_type": "open" if options == "[]" else "multiple-choice",
            **{f"image_{number}": image(index) for number, index in enumerate(images, start=1)},
        }

    return [
        row("Accounting_1", "<image 1> Baxter sells pears. Which is it?", "['$6', '$7', '$8']", "B", 1),
        row(
            *("Art_Theory_12", "Which of them matches <image 1>?", "['<image 3>', '<image 2>', \"It's neither\"]", "A"),
            *(1, 2, 3),
        ),
        row("Math_3", "What is the area in <image 1>?", "[]", "24.32", 5),
        row("Math_4", "Which shape is <image 1>, and which <image 2>?", "[]", "Circle", 4, 5),
    ]


SCIENCEQA_FILE = "ScienceQA-IMG/test-00000-of-00001-f0e719df791966ff.parquet"
SCIENCEQA = {
    "image": IMAGE,
    "question": STRING,
    "choices": List(STRING),
    "answer": Value("int8"),
    **dict.fromkeys(["hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"], STRING),
}


def scienceqa_rows() -> list[dict[str, Any]]:
    """With a hint and without one."""
    return [
        {
            "image": image(1),
            "question": "Which is the solid?",
            "choices": ["a rock", "a river"],
            "answer": 0,
            "hint": "Solids keep their shape.",
            "subject": "natural science",
        },
        {
            "image": image(2),
            "question": "What is the capital of Ohio?",
            "choices": ["Cincinnati", "Cleveland", "Columbus", "Dayton"],
            "answer": 2,
            "hint": "",
            "subject": "social science",
        },
    ]


VIZWIZ_FILE = "data/val-00000-of-00001.parquet"
VIZWIZ = {"question_id": STRING, "image": IMAGE, "question": STRING, "answers": List(STRING), "category": STRING}


def vizwiz_rows() -> list[dict[str, Any]]:
    """What can be answered and what cannot."""
    return [
        {
            "question_id": "VizWiz_val_00000000.jpg",
            "image": image(1),
            "question": "What COLOUR is this, please?",
            "answers": ["Green", "green.", "the green", "teal", "teal", "blue", "unsuitable", "grey", "grey", "gray"],
            "category": "other",
        },
        {
            "question_id": "VizWiz_val_00000001.jpg",
            "image": image(2),
            "question": "can you read it",
            "answers": ["unanswerable"] * 9 + ["no"],
            "category": "unanswerable",
        },
    ]


SETS = {
    "mme": (mme_rows, MME, MME_FILE),
    "mmmu": (mmmu_rows, MMMU, MMMU_FILE),
    "scienceqa": (scienceqa_rows, SCIENCEQA, SCIENCEQA_FILE),
    "vizwiz": (vizwiz_rows, VIZWIZ, VIZWIZ_FILE),
}


def write_set(kind: str, folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A set as it lies on the hub; returns the folder."""
    make, features, file = SETS[kind]
    return write(folder, make() if rows is None else rows, features, file)
