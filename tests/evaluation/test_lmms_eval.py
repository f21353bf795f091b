"""The published benchmarks beside lmms-eval, where it is installed: prompts, readings, scores, and the packed model."""

import importlib.metadata
import random
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
import yaml
from published_data import SETS, write_set

from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate

pytest.importorskip("lmms_eval")

from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks._task_utils import mmmu_mcq_utils
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.mme import utils as mme
from lmms_eval.tasks.mmmu import utils as mmmu
from lmms_eval.tasks.scienceqa import utils as scienceqa
from lmms_eval.tasks.vizwiz_vqa import utils as vizwiz

from bivlm.evaluation.answers import yes_or_no
from bivlm.evaluation.lmms_eval import BivlmModel
from bivlm.evaluation.mmmu_answers import is_among, open_readings, option_letter
from bivlm.evaluation.vqa_accuracy import normalise

# Their task, the module it lies in, the split, and the metrics that are ours.
TASKS = {
    "mme": ("mme", mme, "test", {"mme_perception_score": "perception", "mme_cognition_score": "cognition"}),
    "mmmu": ("mmmu_val", mmmu, "validation", {"mmmu_acc": "accuracy"}),
    "scienceqa": ("scienceqa_img", scienceqa, "test", {"exact_match": "accuracy"}),
    "vizwiz": ("vizwiz_vqa_val", vizwiz, "val", {"exact_match": "accuracy"}),
}
IN_PERCENT = {"perception": 1.0, "cognition": 1.0, "accuracy": 100.0}
ANSWERS = {  # right ones, wrong ones, and odd forms of both; for MMMU none that lmms-eval would guess about
    "mme": ["Yes", "no.", "Yes", "Yes, it is", "** yes", "n"],
    "mmmu": ["The answer is (B)", "A or B", "so the area = 24.32 cm", "It is a blue circle."],
    "scienceqa": ["A. a rock", "Columbus"],
    "vizwiz": ["The GREEN!", "Unanswerable"],
}
_WORDS = "A B C D E (A) (B) A. B. C) b yes no Yes y n the is so = 3.5 1,000 1e3 -2 24.32 . ' , ? ! red USA two none a ١"
PIECES = (
    *_WORDS.split(),
    *("The answer is", "could be ", "\n", ". ", "blue car", "dont", "couldntve", "somebody'd", "it's", "/", "-"),
    *("(red)", "...", "unanswerable", "\t", "inf", "$6", "", " ", "  ", ";", "Final Answer:"),
)


class Told(lmms):
    """A model whose answers are given to it; it remembers what it was asked."""

    def __init__(self, said):
        super().__init__()
        self.said, self.asked = said, []

    def generate_until(self, requests):
        self.asked = [(request.args[0], request.args[1]) for request in requests]
        return self.said

    loglikelihood = generate_until_multi_round = None


@pytest.fixture
def run(tmp_path):
    """lmms-eval's own task on our files, offline; returns its result and its samples in order."""

    def run(kind, folder, model):
        task, module, split, _ = TASKS[kind]
        config = {
            "include": f"{module.__file__.removesuffix('utils.py')}{task}.yaml",
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(folder / SETS[kind][2])},
                "cache_dir": str(tmp_path / "arrow"),
            },
        }
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / f"{task}.yaml").write_text(yaml.safe_dump(config))
        manager = TaskManager("ERROR", include_path=str(tmp_path / "tasks"), include_defaults=False)
        result = simple_evaluate(
            model=model, tasks=[task], task_manager=manager, batch_size=1, bootstrap_iters=0, log_samples=True
        )
        return result["results"][task], sorted(result["samples"][task], key=lambda sample: sample["doc_id"])

    return run


def _outcomes(benchmark, answers):
    rows = [
        (sample.question_id, sample.image_id, sample.category, answer, benchmark.score(sample, answer))
        for sample, answer in zip(benchmark, answers, strict=True)
    ]
    return pd.DataFrame(rows, columns=["question_id", "image_id", "category", "prediction", "score"])


@pytest.mark.parametrize("kind", TASKS)
def test_the_same_answers_to_the_same_prompts_get_the_same_scores(kind, tmp_path, run):
    folder = write_set(kind, tmp_path / "copy")
    benchmark = load_benchmark(f"{kind}:{folder}")
    model = Told(ANSWERS[kind])
    result, _ = run(kind, folder, model)
    assert [prompt for prompt, _ in model.asked] == [sample.question for sample in benchmark]
    lengths = {settings.get("max_new_tokens", benchmark.max_new_tokens) for _, settings in model.asked}
    assert lengths == {benchmark.max_new_tokens}
    outcomes = _outcomes(benchmark, ANSWERS[kind])
    ours = {"accuracy": 100 * outcomes["score"].mean(), **benchmark.summarize(outcomes)}
    for theirs, name in TASKS[kind][3].items():
        assert IN_PERCENT[name] * result[f"{theirs},none"] == pytest.approx(ours[name], abs=6e-4), theirs
    assert 0 < ours["accuracy"] < 100


@pytest.mark.parametrize("kind", TASKS)
def test_the_packed_model_says_the_same_within_lmms_eval(kind, tmp_path, run, packed_llava):
    folder = write_set(kind, tmp_path / "copy")
    benchmark = load_benchmark(f"{kind}:{folder}")
    here = evaluate(*load_model(packed_llava, "cpu"), benchmark).outcomes
    adapter = BivlmModel(str(packed_llava), batch_size=2, device="cpu", max_new_tokens=benchmark.max_new_tokens)
    _, samples = run(kind, folder, adapter)
    assert [sample["filtered_resps"][0] for sample in samples] == list(here["prediction"])


def test_images_are_the_same_and_in_the_same_order(tmp_path):
    for kind, (_, module, _, _) in TASKS.items():
        folder = write_set(kind, tmp_path / kind)
        stored = datasets.load_dataset("parquet", data_files=str(folder / SETS[kind][2]), cache_dir=str(tmp_path))[
            "train"
        ]
        (look,) = [value for name, value in vars(module).items() if name in _VISUALS]
        for sample, row in zip(load_benchmark(f"{kind}:{folder}"), stored, strict=True):
            theirs = [(image.size, image.mode, image.tobytes()) for image in look(row)]
            assert [(image.size, image.mode, image.tobytes()) for image in sample.images] == theirs


_VISUALS = {"mme_doc_to_visual", "mmmu_doc_to_visual", "sqa_doc_to_visual", "vizwiz_vqa_doc_to_visual"}


class GuessError(Exception):
    """Where lmms-eval would draw an option."""


def test_twenty_thousand_random_texts_are_read_alike(monkeypatch, tmp_path):
    def guess(options):
        raise GuessError

    monkeypatch.setattr(mmmu_mcq_utils, "random", SimpleNamespace(choice=guess))
    choose, processor, guesses = random.Random(0), EvalAIAnswerProcessor(), 0
    science = load_benchmark(f"scienceqa:{write_set('scienceqa', tmp_path)}")
    questions = [
        (sample, {"choices": list(sample.choices), "answer": "AC".index(sample.answers[0]) * 2}) for sample in science
    ]
    options = ["red", "blue car", "$6", "the"]
    for _ in range(20_000):
        pieces = choose.choices(PIECES, k=choose.randrange(9))
        text = "".join(piece + choose.choice(("", " ", " ")) for piece in pieces).strip()
        assert (yes_or_no(text) or "other") == mme.parse_pred_ans(text), text
        assert normalise(text) == processor(text), text
        given = options[: choose.randint(2, 4)]
        names, letters = mmmu.get_multi_choice_info(given)
        try:
            theirs = mmmu.parse_multi_choice_response(text, letters, names)
        except GuessError:
            theirs, guesses = None, guesses + 1
        assert option_letter(text, given) == theirs, text
        parsed = mmmu.parse_open_response(text)
        assert set(parsed) == open_readings(text), text
        right = choose.choice([["24.32"], ["3.5"], ["red"], ["B"], ["1000", "b"], ["inf"]])
        assert mmmu.eval_open(right, parsed) == is_among(open_readings(text), right), (text, right)
        for sample, doc in questions:
            theirs = scienceqa.sqa_process_results(doc, [text])["exact_match"]
            assert science.score(sample, text) == theirs, text
    assert guesses > 1000


def test_a_multiple_choice_that_cannot_be_read_is_wrong_here_and_a_guess_there(tmp_path, run):
    folder = write_set("mmmu", tmp_path / "copy")
    benchmark = load_benchmark(f"mmmu:{folder}")
    said = ["cannot tell", "no idea", "24.32", "circle"]
    _, samples = run("mmmu", folder, Told(said))
    outcomes = _outcomes(benchmark, said)
    assert list(outcomes["score"]) == [0, 0, 1, 1]
    assert benchmark.summarize(outcomes)["unparsable"] == 2
    assert all(sample["mmmu_acc"]["parsed_pred"][0] in "ABC" for sample in samples[:2])


def test_lmms_eval_finds_the_model_by_its_entry_point():
    from lmms_eval.models import get_model
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from bivlm.evaluation.lmms_eval import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("bivlm") is BivlmModel
    if any(point.name == "bivlm" for point in importlib.metadata.entry_points(group="lmms_eval.models")):
        assert get_model("bivlm") is BivlmModel
