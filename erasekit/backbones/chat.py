"""Prompts as a language model reads them: as what a user says in a chat, in the tokenizer's own template."""

from __future__ import annotations

import re
from typing import Any

import torch

MARK = "\ue000"  # stands for a prompt


class Chat:
    """The template of a tokenizer of byte pairs: where a prompt's tokens stand in it.

    Attributes:
        begin: how many tokens stand before a prompt.
        end: the id of the token right behind it. More words of the template may follow, and then pads.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        """Prompts have `length` tokens, the template's and pads included.

        Raises:
            ValueError: the tokenizer has no template, or puts pads before a prompt.
        """
        if tokenizer.padding_side != "right":
            raise ValueError("its tokenizer puts pads before a prompt, where erasekit has them behind")
        self._tokenizer, self._length = tokenizer, length
        self._head, _, tail = self._applied(MARK).partition(MARK)
        self.begin = len(tokenizer(self._head).input_ids)
        self.end = int(tokenizer(tail).input_ids[0])

    def ids(self, prompt: str) -> torch.Tensor:
        """The ids (1, length) of a prompt."""
        given = self._tokenizer(self._applied(prompt), padding="max_length", truncation=True, max_length=self._length)
        return torch.tensor([given.input_ids])

    def lengths(self, ids: torch.Tensor) -> torch.Tensor:
        """How many tokens prompts (n, length) have up to the end token; all, where a long one has lost it."""
        ends = (ids == self.end).int()
        return torch.where(ends.any(1), ends.argmax(1) + 1, ids.shape[1])

    def unpadded(self, ids: torch.Tensor) -> torch.Tensor:
        """Where in prompts (n, length) no pads stand, 1 or 0; the template's words behind a prompt are none."""
        return (ids.ne(self._tokenizer.pad_token_id).flip(1).cumsum(1).flip(1) > 0).long()

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """Positions at which `phrase` stands in `prompt` as whole words, in upper or lower case.

        A token of byte pairs holds the space before its word, so a phrase has other tokens at the beginning of a prompt: they
        are found by the letters that each stands for.
        """
        text = self._applied(prompt)
        given = self._tokenizer(text, truncation=True, max_length=self._length, return_offsets_mapping=True)
        pattern = rf"(?<!\w){re.escape(phrase)}(?!\w)" if phrase else r"(?!)"
        found = []
        for match in re.finditer(pattern, prompt, re.IGNORECASE):
            start, stop = match.start() + len(self._head), match.end() + len(self._head)
            at = [i for i, (first, last) in enumerate(given.offset_mapping) if first < stop and last > start]
            found += [range(at[0], at[-1] + 1)] if at else []
        return found

    def spell(self, ids: torch.Tensor) -> str:
        """The text of a prompt's ids (length,) without the template and pads."""
        end = int(self.lengths(ids[None])[0])
        text: str = self._tokenizer.decode(ids[self.begin : end], skip_special_tokens=True)
        return " ".join(text.split())

    def _applied(self, prompt: str) -> str:
        said = [{"role": "user", "content": prompt}]
        text: str = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return text
