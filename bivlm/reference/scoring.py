"""How an answer is scored on each set; the same rules as the benchmarks that the sets are shaped like."""

from collections import defaultdict
from collections.abc import Iterable


def vqa_score(answer: str, answers: tuple[str, ...]) -> float:
    """VQA accuracy in [0, 1]: the mean over the annotators of min(1, matches among the others / 3)."""
    said = answer.strip().rstrip(".").lower()
    matches = sum(said == other.lower() for other in answers)
    scores = [min(1.0, (matches - (said == other.lower())) / 3) for other in answers]
    return sum(scores) / len(scores)


def score(name: str, answer: str, answers: tuple[str, ...]) -> float:
    """Score in [0, 1] of one answer: VQA accuracy for open, otherwise whether it is the expected word or letter."""
    if name == "open":
        return vqa_score(answer, answers)
    said, expected = answer.strip(), answers[0]
    if name == "choice":
        return float(said == expected or said.startswith(f"{expected}."))
    return float(said.lower().rstrip(".") == expected)


def mme_score(results: Iterable[tuple[str, str, float]]) -> float:
    """MME total of (category, image id, correct): per category accuracy + accuracy of whole images, in percent."""
    by_category: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for category, image, correct in results:
        by_category[category][image].append(correct)
    total = 0.0
    for images in by_category.values():
        single = [correct for pair in images.values() for correct in pair]
        whole = [float(min(pair) == 1.0) for pair in images.values()]
        total += 100 * sum(single) / len(single) + 100 * sum(whole) / len(whole)
    return total
