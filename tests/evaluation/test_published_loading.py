"""Published benchmarks are read from copies in their own layout, and what is wrong with a copy is named."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict, Value, load_dataset
from published_data import (
    LETTER,
    MME,
    MMMU,
    SETS,
    VIZWIZ,
    WORD,
    data_set,
    image,
    mme_rows,
    mmmu_rows,
    scienceqa_rows,
    vizwiz_rows,
    write,
    write_set,
)

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import benchmark_kinds, load_benchmark
from bivlm.evaluation.outcomes import evaluate, read_outcomes, write_outcomes
from bivlm.evaluation.paired import loss_between

KINDS = list(SETS)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def short_answers(monkeypatch):
    """The random model never ends an answer by itself."""
    for kind in benchmark_kinds().values():
        monkeypatch.setattr(kind, "max_new_tokens", 4, raising=False)


def test_prompts_are_those_of_lmms_eval(tmp_path):
    asked = {
        kind: [sample.question for sample in load_benchmark(f"{kind}:{write_set(kind, tmp_path / kind)}")]
        for kind in KINDS
    }
    assert asked["mme"][0] == f"Is it 0 Yes?\n{WORD}"
    assert asked["mmmu"][1] == (
        f"Which of them matches <image 1>?\nA. <image 3>\nB. <image 2>\nC. It's neither\n\n{LETTER}"
    )
    assert asked["mmmu"][2] == f"What is the area in <image 1>?\n\n{WORD}"
    assert asked["scienceqa"] == [
        f"Context: Solids keep their shape.\nWhich is the solid?\nA. a rock\nB. a river\n{LETTER}",
        f"What is the capital of Ohio?\nA. Cincinnati\nB. Cleveland\nC. Columbus\nD. Dayton\n{LETTER}",
    ]
    unanswerable = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert asked["vizwiz"][0] == f"What colour is this, please?\n{unanswerable}\n{WORD}"


def test_images_come_with_their_question_in_the_order_of_their_numbers(tmp_path):
    def colours(kind):
        samples = load_benchmark(f"{kind}:{write_set(kind, tmp_path / kind)}")
        return [[image.getpixel((0, 0))[0] for image in sample.images] for sample in samples]

    assert colours("mme") == [[0], [0], [40], [40], [80], [80]]
    assert colours("mmmu") == [[40], [40, 80, 120], [200], [160, 200]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_asked_end_to_end_and_its_outcomes_are_paired(kind, tmp_path, loaded, short_answers):
    benchmark = load_benchmark(f"{kind}:{write_set(kind, tmp_path)}")
    result = evaluate(*loaded, benchmark, batch_size=2)
    assert result.n == len(benchmark) == len(SETS[kind][0]())
    assert result.record()["source"]["split"] == {"mmmu": "validation", "vizwiz": "val"}.get(kind, "test")
    assert ("intervals" in result.record()) == (kind == "mme")
    again = read_outcomes(write_outcomes(result.outcomes, tmp_path / "outcomes.parquet"))
    assert loss_between(result.outcomes, again).loss == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_copy_of_a_set_has_one_digest_and_a_changed_image_another(kind, tmp_path):
    rows, features, file = SETS[kind][0](), *SETS[kind][1:]
    digest = load_benchmark(f"{kind}:{write_set(kind, tmp_path / 'parquet')}").digest
    data, split = data_set(rows, features), file.split("/")[1].partition("-")[0]
    data.save_to_disk(tmp_path / "saved")
    assert load_benchmark(f"{kind}:{tmp_path / 'saved'}").digest == digest
    DatasetDict({"train": data.select([0]), split: data}).save_to_disk(tmp_path / "splits")
    assert load_benchmark(f"{kind}:{tmp_path / 'splits'}").digest == digest
    plain = pa.table({"x": [1]})  # another file, which is no part of the split
    copy = write_set(kind, tmp_path / "copy")
    pq.write_table(plain, copy / file.replace(split, "train"))
    assert load_benchmark(f"{kind}:{copy}").digest == digest
    column = next(name for name in rows[-1] if name.startswith("image"))
    changed = [*rows[:-1], {**rows[-1], column: image(9)}]
    assert load_benchmark(f"{kind}:{write_set(kind, tmp_path / 'changed', changed)}").digest != digest


def test_a_file_that_is_written_anew_is_hashed_anew(tmp_path):
    folder = write_set("vizwiz", tmp_path)
    digest = load_benchmark(f"vizwiz:{folder}").digest
    write_set("vizwiz", tmp_path, [{**vizwiz_rows()[0], "image": image(8)}, vizwiz_rows()[1]])
    assert load_benchmark(f"vizwiz:{folder}").digest != digest


def test_nothing_is_decoded_for_the_digest_nor_before_it_is_asked(tmp_path):
    rows = vizwiz_rows()
    rows[1]["image"] = {"bytes": b"no image", "path": None}
    benchmark = load_benchmark(f"vizwiz:{write_set('vizwiz', tmp_path, rows)}")
    assert len(benchmark.digest) == 64
    samples = iter(benchmark)
    assert next(samples).image.size == (40, 30)
    with pytest.raises(InputError, match=r"vizwiz:.*, split val, row 1, column 'image': expected an image"):
        next(samples)


def test_a_limit_takes_the_first_questions_and_may_part_a_pair(tmp_path):
    folder = write_set("mme", tmp_path)
    whole, part = load_benchmark(f"mme:{folder}"), load_benchmark(f"mme:{folder}", 3)
    assert [s.question_id for s in part] == [s.question_id for s in whole][:3]
    assert part.digest != whole.digest
    assert len(list(part)) == len(part) == 3


def test_questions_about_one_image_of_mme_have_ids_of_their_own_and_the_image_in_common(tmp_path):
    rows = mme_rows()
    samples = list(load_benchmark(f"mme:{write_set('mme', tmp_path, [rows[0], rows[2], *rows[1:2], *rows[3:]])}"))
    assert [sample.question_id for sample in samples[:4]] == [
        "count/1.png 1", "count/2.png 1", "count/1.png 2", "count/2.png 2",
    ]  # fmt: skip
    assert samples[0].image_id == samples[2].image_id == "count/1.png"


def test_a_question_of_mmmu_without_an_image_is_asked_without_one(tmp_path, loaded, short_answers):
    rows = [{**mmmu_rows()[2], "question": "What is 4 times 6.08?"}, mmmu_rows()[0]]
    benchmark = load_benchmark(f"mmmu:{write_set('mmmu', tmp_path, rows)}")
    assert [len(sample.images) for sample in benchmark] == [0, 1]
    assert evaluate(*loaded, benchmark).n == 2


def test_scienceqa_is_found_in_its_subset_with_or_without_a_card(tmp_path):
    write_set("scienceqa", tmp_path)
    other = tmp_path / "ScienceQA-FULL" / "test-00000-of-00001.parquet"
    other.parent.mkdir()
    pq.write_table(pa.table({"x": [1]}), other)
    bare = load_benchmark(f"scienceqa:{tmp_path}")
    configs = [f"- config_name: {name}\n  data_files:\n  - {{split: test, path: {name}/test-*}}\n" for name in _SUBSETS]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    with_card = load_benchmark(f"scienceqa:{tmp_path}")
    assert with_card.source()["subset"] == "ScienceQA-IMG"
    assert with_card.digest == bare.digest == load_benchmark(f"scienceqa:{tmp_path / 'ScienceQA-IMG'}").digest


_SUBSETS = ("ScienceQA-FULL", "ScienceQA-IMG")


@pytest.mark.parametrize(
    ("kind", "number", "changes", "message"),
    [
        ("mme", 1, {"answer": "Maybe"}, r"row 1, column 'answer': found 'Maybe', expected Yes or No"),
        ("mme", 2, {"category": "colour"}, r"row 2, column 'category': found 'colour', expected one of existence, "),
        ("mme", 0, {"question": None}, r"row 0, column 'question': found None, expected a string"),
        ("mme", 5, {"question_id": "x"}, r"found 1 rows with the question_id 'code_reasoning/0020.png' .*expected two"),
        ("mme", 2, {"question_id": "count/1.png"}, r"found 3 rows with the question_id 'count/1.png'"),
        ("mmmu", 0, {"answer": "D"}, r"row 0, column 'answer': found 'D', expected one of the letters ABC"),
        ("mmmu", 0, {"options": "red, blue"}, r"row 0, column 'options': found 'red, blue', expected a list"),
        ("mmmu", 1, {"question_type": "essay"}, r"row 1, column 'question_type': found 'essay', expected multiple"),
        ("mmmu", 2, {"id": "Math"}, r"row 2, column 'id': found 'Math', expected an id such as"),
        ("mmmu", 3, {"id": "validation_Math_3"}, r"found 2 rows with the id 'validation_Math_3', expected one"),
        ("mmmu", 3, {"question": "<image 9>?"}, r"row 3, column 'question': .*image_1 to image_7, and not image_9"),
        ("scienceqa", 1, {"answer": 4}, r"row 1, column 'answer': found 4, expected the number of a choice, 0 to 3"),
        ("scienceqa", 0, {"choices": []}, r"row 0, column 'choices': found \[\], expected a list of strings"),
        ("vizwiz", 0, {"answers": None}, r"row 0, column 'answers': found None, expected a list of strings"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_or_scored_is_named_by_row_and_column(tmp_path, kind, number, changes, message):
    rows = SETS[kind][0]()
    rows[number] = {**rows[number], **changes}
    with pytest.raises(InputError, match=rf"{kind}:{tmp_path}, split \w+(, |: ){message}"):
        load_benchmark(f"{kind}:{write_set(kind, tmp_path, rows)}")


def test_an_image_that_a_question_names_must_be_there(tmp_path):
    rows = [mmmu_rows()[0], {**mmmu_rows()[1], "image_2": None}]
    benchmark = load_benchmark(f"mmmu:{write_set('mmmu', tmp_path, rows)}")
    for use in (list, lambda benchmark: benchmark.digest):
        with pytest.raises(InputError, match=r"row 1, column 'image_2': found None, expected the bytes of an image"):
            use(benchmark)


@pytest.mark.parametrize("missing", ["answers", "image"])
def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path, missing):
    features = {name: feature for name, feature in VIZWIZ.items() if name != missing}
    folder = write(tmp_path, vizwiz_rows(), features, SETS["vizwiz"][2])
    with pytest.raises(InputError, match=rf"split val: column '{missing}' is missing, found the columns question_id, "):
        load_benchmark(f"vizwiz:{folder}")


def test_columns_that_a_set_can_do_without_may_be_missing(tmp_path):
    features = {name: feature for name, feature in VIZWIZ.items() if name != "category"}
    benchmark = load_benchmark(f"vizwiz:{write(tmp_path, vizwiz_rows(), features, SETS['vizwiz'][2])}")
    assert [sample.category for sample in benchmark] == ["", ""]


def test_another_split_is_refused_with_those_that_are_there(tmp_path):
    folder = write(tmp_path / "files", mme_rows(), MME, "data/train-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"mme:.*: no split test, found train"):
        load_benchmark(f"mme:{folder}")
    load_dataset(str(folder), split="train").save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"mme:.*: found split train, expected test"):
        load_benchmark(f"mme:{tmp_path / 'saved'}")
    load_dataset(str(folder)).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"mme:.*: no split test, found train"):
        load_benchmark(f"mme:{tmp_path / 'splits'}")


def test_a_set_of_subsets_is_refused_by_their_names(tmp_path):
    configs = [f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("Art", "Math")]
    for name in ("Art", "Math"):
        write(tmp_path, mmmu_rows(), MMMU, f"{name}/validation-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    with pytest.raises(InputError, match=r"mmmu:.*: found the subsets Art, Math, expected one set alone"):
        load_benchmark(f"mmmu:{tmp_path}")


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and nothing more"])
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "test.parquet").write_bytes(content)
    with pytest.raises(InputError, match=rf"mme:{tmp_path}"):
        load_benchmark(f"mme:{tmp_path}")


def test_a_copy_with_files_missing_is_refused_instead_of_asking_fewer_questions(tmp_path):
    for part in range(2):
        write(tmp_path, mme_rows()[2 * part :][:2], MME, f"data/test-0000{part}-of-00003-5a25dbe3.parquet")
    with pytest.raises(InputError, match=r"mme:.*: found 2 of the 3 files of test, expected all of them"):
        load_benchmark(f"mme:{tmp_path}")
    write(tmp_path, mme_rows()[4:], MME, "data/test-00002-of-00003-b2c4.parquet")
    assert len(load_benchmark(f"mme:{tmp_path}")) == 6


def test_files_of_another_form_and_empty_ones_are_refused(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "test.csv").write_text("question_id\n1\n")
    with pytest.raises(InputError, match=r"found test\.csv, expected parquet files"):
        load_benchmark(f"mme:{tmp_path / 'csv'}")
    with pytest.raises(InputError, match=r"split test: found no rows"):
        load_benchmark(f"mme:{write_set('mme', tmp_path / 'empty', [])}")


@pytest.mark.parametrize("argument", ["nowhere", "/nowhere/at/all", "a/b/c", "owner/name@", "hub@", "owner/na me"])
def test_what_is_no_folder_and_no_name_is_refused(argument):
    with pytest.raises(InputError, match=r"no such folder, and not of the form hub, OWNER/NAME or OWNER/NAME@REVISION"):
        load_benchmark(f"scienceqa:{argument}")


def test_numbers_of_other_types_are_read_alike(tmp_path):
    rows, features, file = scienceqa_rows(), {**SETS["scienceqa"][1], "answer": Value("int64")}, SETS["scienceqa"][2]
    assert (
        load_benchmark(f"scienceqa:{write(tmp_path / 'wide', rows, features, file)}").digest
        == load_benchmark(f"scienceqa:{write_set('scienceqa', tmp_path / 'narrow')}").digest
    )
