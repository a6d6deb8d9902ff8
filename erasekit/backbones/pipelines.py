"""What the backbones over a diffusers pipeline share: encoding, predictions, the layers that can be trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from erasekit.backbones.parts import PipelineParts
from erasekit.backbones.protocol import Capabilities, Conditioning, Lexicon, concatenate
from erasekit.backbones.words import fragments
from erasekit.errors import ErasekitError, UsageError
from erasekit.events import progress
from erasekit.quiet import quiet
from erasekit.safety import reject_unsafe


class PipelineBackbone(PipelineParts):
    """A backbone over a diffusers pipeline in a folder.

    A subclass with a `name`, a `domain` and a `path` of its own is another model of the same class.

    Attributes:
        sampling: settings of a task's protocol that are other ones on this backbone.
        reads: which field of a Conditioning each text encoder fills.
        call: what a plain call of the pipeline has to be told, where the pipeline's own defaults are for another model.
        licence: of the model at `path`, as the hub's front matter has it.
    """

    name: ClassVar[str]
    reads: ClassVar[Mapping[str, Literal["tokens", "pooled"]]] = {"text_encoder": "tokens"}
    domain: ClassVar[Literal["natural", "mini"]] = "natural"
    capabilities: ClassVar[Capabilities]
    sampling: ClassVar[Mapping[str, Any]] = {}
    call: ClassVar[Mapping[str, Any]] = {}
    licence: ClassVar[Mapping[str, str]] = {}

    @property
    def embedded_guidance(self) -> bool:
        """Whether a guidance scale is an input of the model."""
        return False

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the pipeline's own `encode_prompt`, each once; what is encoded lies on the CPU.

        One prompt at a time: what a prompt encodes to must not depend on the batch that it comes in.

        Raises:
            UsageError: a prompt is one that erasekit refuses.
            ErasekitError: a new prompt comes after the encoders have made room for the denoiser.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        reject_unsafe(missing)  # whoever made them: a user, a task, a method, a plugin
        for i, prompt in enumerate(missing):
            self._refuse_late(prompt)
            progress("encoding", i, len(missing))
            for name in self.encoders:
                setattr(self._pipe, name, self._part(name))
            with torch.no_grad(), quiet():
                self._encoded[prompt] = self._encode(prompt).to("cpu", self.dtype)
        if missing:
            progress("encoding", len(missing), len(missing))
        if not prompts:
            return self.encode([""])[:0]
        return concatenate([self._encoded[prompt] for prompt in prompts])

    def expect(self, texts: Callable[[], Sequence[str]]) -> None:
        """Encode these prompts too, if and when the text encoders have to make room for the denoiser."""
        self._expected = texts

    def vocabulary(self, near: str, n: int) -> list[str]:
        """The `n` whole words of the CLIP tokenizer that its encoder embeds nearest to the words of a text, nearest first.

        Pieces that end many words and begin hardly any ("lly", "tion") are none.
        """
        if (near, n) not in self._near:
            self._refuse_late(near)
            tokenizer, encoder = self._pipe.tokenizer, self._part(self.encoders[0])
            whole = {token: i for token, i in tokenizer.get_vocab().items() if re.fullmatch("[a-z]{3,}</w>", token)}
            pieces = fragments(tokenizer.get_vocab())
            whole = {token: i for token, i in whole.items() if token.removesuffix("</w>") not in pieces}
            table = nn.functional.normalize(encoder.get_input_embeddings().weight.detach().float(), dim=1)
            own = table[tokenizer(near, add_special_tokens=False).input_ids]
            nearness = (table[list(whole.values())] @ own.T).amax(1)
            words = [token.removesuffix("</w>") for token in whole]
            self._near[near, n] = [words[i] for i in nearness.argsort(descending=True)[:n].tolist()]
        return self._near[near, n]

    def tokenize(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The ids (n, length) that each text encoder reads for prompts, pads included; on the CPU."""
        given = {name: [self._tokenized(p, *self._tokenizer(name))["ids"] for p in prompts] for name in self.encoders}
        return {name: torch.cat(ids) for name, ids in given.items()}

    def lexicon(self, encoder: str) -> Lexicon:
        """The tokens of a text encoder, on the device that it is on."""
        tokenizer, _ = self._tokenizer(encoder)
        vectors = self._part(encoder).get_input_embeddings().weight.detach()
        usable = torch.zeros(len(vectors), dtype=torch.bool)
        known = [i for i in tokenizer.get_vocab().values() if i < len(vectors)]  # T5's table has more rows than tokens
        usable[known] = True
        usable[[i for i in tokenizer.all_special_ids if i < len(vectors)]] = False
        ids = tokenizer("").input_ids
        return Lexicon(vectors, usable, begin=len(ids) - 1, end=ids[-1], pad=tokenizer.pad_token_id)

    def spell(self, encoder: str, ids: torch.Tensor) -> str:
        """The text of one prompt's ids (length,) without begin, end and pad tokens."""
        text: str = self._tokenizer(encoder)[0].decode(ids, skip_special_tokens=True)
        return " ".join(text.split())

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """Encode token ids, differentiable in `vectors`; see `Backbone`.

        An encoder runs as it is, bit for bit: a hook on its table of tokens hands it the vectors.
        """
        found: dict[str, Any] = {} if like is None else dict(vars(like.to(self.device, self.dtype)))
        for name, ids in tokens.items():
            out = self._read(name, ids, vectors)
            field = self.reads[name]
            found[field] = (out.pooler_output if field == "pooled" else out.last_hidden_state).to(self.device, self.dtype)
            if field == "tokens":
                end = self._tokenizer(name)[0].eos_token_id
                found |= {"ids": ids.cpu(), "lengths": (ids.cpu() == end).int().argmax(1) + 1}
        return Conditioning(**{"pooled": None} | found)

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Finished latents (n, channels, h, w) of images (n, 3, h, w) in [-1, 1]: the mode of what the VAE gives."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        with torch.no_grad():
            given = self.vae.encode(images.to(self.device, self.dtype))
        latents = given.latent_dist.mode() if hasattr(given, "latent_dist") else given.latents
        x0: torch.Tensor = (latents - shift) * config.scaling_factor
        return x0

    def rows(self, x: torch.Tensor) -> int:
        """The most rows like those of `x` that are predicted at once without gradients."""
        return max(1, int(self._held.rows / self._share_of(x)))

    def predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, *, guidance: float = 1.0) -> torch.Tensor:
        """The denoiser's own prediction for latents `x` (b, ...) at progress `tau` (b,), on the device of `x`.

        Without gradients in chunks of at most `rows`. Latents and encoded prompts may lie on the CPU.
        """
        most = max(1, len(x)) if torch.is_grad_enabled() else self.rows(x)
        parts = []
        for first in range(0, max(1, len(x)), most):
            here = slice(first, first + most)
            text = cond[here].to(self.device, self.dtype)
            parts.append(self._predict(x[here].to(self.device), tau[here], text, guidance).to(x.device))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def summaries(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the CLIP encoder makes of each prompt as a whole (n, width), float64 on the CPU; no other encoder runs."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._summed]
        for i in range(0, len(missing), 32):
            self._refuse_late(missing[i])
            self._summed |= dict(zip(missing[i : i + 32], self._summarise(missing[i : i + 32]), strict=True))
        return torch.stack([self._summed[prompt] for prompt in prompts])

    @torch.no_grad()
    def _summarise(self, prompts: Sequence[str]) -> torch.Tensor:
        tokenizer, encoder = self._pipe.tokenizer, self._part(self.encoders[0])
        length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        ids = tokenizer(list(prompts), return_tensors="pt", **length)
        out = encoder(ids.input_ids.to(encoder.device))
        pooled: torch.Tensor = out.text_embeds if "text_embeds" in out else out.pooler_output
        return pooled.double().cpu()

    def lora_targets(self, scope: str) -> list[str]:
        """Linear layers of a scope (see `scopes`).

        Raises:
            UsageError: the scope is unknown or matches nothing.
        """
        if scope not in self.scopes:
            raise UsageError(f"Unknown scope '{scope}'. '{self.name}' has {', '.join(self.scopes)}.")
        names = [name for name in self._linears if re.search(self.scopes[scope], name)]
        if not names:
            raise UsageError(f"Scope '{scope}' matches no layer of '{self.source}'.")
        return names

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1]; works for `AutoencoderKL` and `AutoencoderTiny`."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        image: torch.Tensor = self.vae.decode(x0 / config.scaling_factor + shift, return_dict=False)[0]
        return image

    def _read(self, name: str, ids: torch.Tensor, vectors: Mapping[str, torch.Tensor] | None, **how: Any) -> Any:
        """What a text encoder puts out for token ids, reading vectors in their place if there are any for it."""
        encoder = self._part(name)
        with handing(encoder, (vectors or {}).get(name)):
            return encoder(ids.to(encoder.device), **how)

    def _encode(self, prompt: str) -> Conditioning:
        """One prompt, encoded."""
        raise NotImplementedError

    def _tokenizer(self, encoder: str) -> tuple[Any, int]:
        """The tokenizer of a text encoder, and how many tokens that reads."""
        raise NotImplementedError

    def _predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, guidance: float) -> torch.Tensor:
        """The prediction for rows that are on the device and go through the denoiser together."""
        raise NotImplementedError

    def _share_of(self, x: torch.Tensor) -> float:
        """What a row of latents takes, in units of the reference size."""
        raise NotImplementedError

    def _refuse_late(self, prompt: str) -> None:
        if self._alone:
            raise ErasekitError(
                f"'{prompt}' is to be encoded after the text encoders have made room for the denoiser. A method names all its "
                f"prompts before (Method.texts)."
            )

    def _tokenized(self, prompt: str, tokenizer: Any, length: int) -> dict[str, torch.Tensor]:
        """`ids` (1, length) as `encode_prompt` pads them, and `lengths` (1,), how many of them are no pads."""
        given = tokenizer(prompt, padding="max_length", truncation=True, max_length=length)
        return {"ids": torch.tensor([given.input_ids]), "lengths": torch.tensor([sum(given.attention_mask)])}

    def _spans(self, prompt: str, phrase: str, tokenizer: Any, length: int) -> list[range]:
        """Where the tokens of a phrase stand in those of a prompt."""
        given = self._tokenized(prompt, tokenizer, length)
        ids = given["ids"][0, : int(given["lengths"])].tolist()
        wanted = tokenizer(phrase, add_special_tokens=False).input_ids
        starts = range(len(ids) - len(wanted) + 1) if wanted else range(0)
        return [range(i, i + len(wanted)) for i in starts if ids[i : i + len(wanted)] == wanted]


@contextmanager
def handing(encoder: Any, vectors: torch.Tensor | None) -> Iterator[None]:
    """Let a text encoder read vectors in place of the rows of its table of tokens (T5 has one table in two modules)."""
    if vectors is None:
        yield
        return
    own, table = vectors, encoder.get_input_embeddings().weight
    places = [m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is table]
    hooks = [place.register_forward_hook(lambda module, given, out: own.to(out)) for place in places]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
