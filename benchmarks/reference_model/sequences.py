"""Many independent questions about one image in one training sequence.

The sequence is a prefix (`USER: `, the image, a line break) and then segments, each `question ASSISTANT: answer</s>`.
A segment attends to the prefix and to itself alone, and its positions start where the prefix ends: every question is
the first one of its conversation, exactly as the chat template renders it at test time.

Shapes: B sequences, T tokens a sequence, P prefix tokens (66, of which 64 belong to the image).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bivlm.reference.tokenizer import ASSISTANT, EOS_TOKEN, IMAGE_TOKEN, USER

IGNORED = -100


@dataclass(frozen=True)
class Segment:
    """A user turn, the reply to learn with the loss weight of each of its tokens, and a label for reports.

    `known` is the place of a character of the user turn whose word is true and can be foretold from what stands before
    it; that word is learned too. The rest is for the loss in the middle of the decoder: `early` says that the reply
    only looks something up, `truth` is the word from which a yes, a no or a letter follows.
    """

    user: str
    assistant: str
    weight: float = 1.0
    known: int | None = None
    early: bool = False
    truth: str | None = None
    label: str = ""


@dataclass
class Packed:
    """A batch of packed sequences.

    `input_ids` (B, T); `positions` (B, T); `mask` bool (B, 1, T, T), True where a token may look; `targets` (B, T), the
    token to predict *at* each position or -100; `weights` (B, T); `middle` (B, T), the token to know there in the
    middle of the decoder or -100; `segment_ids` (B, T): 0 for the prefix, -1 for padding, else 1 + the index into
    `labels[b]`.
    """

    input_ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor
    middle: Tensor
    segment_ids: Tensor
    labels: list[list[str]]

    def to(self, device: torch.device) -> "Packed":
        moved = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "positions", "mask", "targets", "weights", "middle", "segment_ids")
        }
        return Packed(**moved, labels=self.labels)


class Packer:
    """Turns lists of segments into fixed-length sequences; segments that do not fit any more are left out."""

    def __init__(self, tokenizer, length: int, image_tokens: int = 64):
        self.tokenizer, self.length, self.image_tokens = tokenizer, length, image_tokens
        self.eos = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id
        self._user = self._encode(USER)
        self._image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._break = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def prefix(self, image: bool) -> tuple[list[int], list[int]]:
        """Tokens and positions before the first segment. Without an image its positions are skipped, not closed."""
        start = len(self._user)
        end = start + self.image_tokens
        positions = [*range(start), *(range(start, end) if image else ()), end]
        return self._user + [self._image] * (self.image_tokens if image else 0) + self._break, positions

    def pack(self, batch: list[list[Segment]], *, image: bool) -> Packed:
        """One sequence per list of segments; `image` says whether the prefix holds an image."""
        size, length = len(batch), self.length
        ids = torch.full((size, length), self.pad)
        positions = torch.zeros((size, length), dtype=torch.long)
        targets = torch.full((size, length), IGNORED)
        weights = torch.zeros((size, length))
        middle = torch.full((size, length), IGNORED)
        segment_ids = torch.full((size, length), -1)
        labels: list[list[str]] = [[] for _ in batch]
        prefix, prefix_positions = self.prefix(image)
        after = prefix_positions[-1] + 1
        texts = [
            text for segments in batch for s in segments for text in (s.user + ASSISTANT, f" {s.assistant}{EOS_TOKEN}")
        ]
        encoded = iter(self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        for row, segments in enumerate(batch):
            end = len(prefix)
            ids[row, :end] = torch.tensor(prefix)
            positions[row, :end] = torch.tensor(prefix_positions)
            segment_ids[row, :end] = 0
            for segment in segments:
                asked, answer = next(encoded), next(encoded).ids
                question = asked.ids
                start, stop = end, end + len(question) + len(answer)
                if stop > length:
                    continue
                ids[row, start:stop] = torch.tensor(question + answer)
                positions[row, start:stop] = torch.arange(after, after + stop - start)
                learned = slice(start + len(question) - 1, stop - 1)
                targets[row, learned] = torch.tensor(answer)
                weights[row, learned] = segment.weight
                if segment.early:
                    middle[row, learned] = torch.tensor(answer)
                elif segment.truth is not None:
                    middle[row, learned.start] = self._encode(f" {segment.truth}")[0]
                if segment.known is not None:
                    word = asked.char_to_token(segment.known)
                    targets[row, start + word - 1] = question[word]
                    weights[row, start + word - 1] = 1.0
                    middle[row, start + word - 1] = question[word]
                labels[row].append(segment.label)
                segment_ids[row, start:stop] = len(labels[row])
                end = stop
        return Packed(ids, positions, _mask(segment_ids), targets, weights, middle, segment_ids, labels)


def _mask(segment_ids: Tensor) -> Tensor:
    """bool (B, 1, T, T): causal, within the segment or to the prefix; padding sees itself, so softmax is defined."""
    length = segment_ids.shape[1]
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (((query == key) | ((key == 0) & (query > 0))) & causal)[:, None]
