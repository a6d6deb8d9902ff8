"""What the backbones over a diffusers pipeline share: where the files are, and parts that are loaded when first used."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from erasekit.backbone import BackboneConfig, Capabilities, Conditioning, Site, concatenate
from erasekit.builtin.folders import download, first_line, local_folder, part_config, tensor_files
from erasekit.builtin.held import HeldPipeline, check_nf4, find_device, skeleton
from erasekit.builtin.shards import read_tensor
from erasekit.builtin.words import fragments
from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError
from erasekit.events import progress
from erasekit.memory import vram_gb
from erasekit.quiet import quiet

_LOADING = (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError, RuntimeError)


class PipelineBackbone(HeldPipeline):
    """A backbone over a diffusers pipeline in a folder; its models are loaded when they are first used.

    A subclass with a `name`, a `domain` and a `path` of its own is another model of the same class.

    Attributes:
        pipeline_class: the diffusers pipeline.
        unused: parts of the pipeline that erasekit never loads.
        scopes: {name: pattern of the denoiser's linear layers}.
        sampling: settings of a task's protocol that are other ones on this backbone.
        source: hub id, or the name of the local folder.
        revision: the commit on the hub, "" for a local folder.
    """

    name: ClassVar[str]
    domain: ClassVar[Literal["natural", "mini"]] = "natural"
    capabilities: ClassVar[Capabilities]
    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    pipeline_class: ClassVar[Any]
    unused: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[Mapping[str, str]]
    sampling: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self, folder: Path, config: BackboneConfig, *, source: str, revision: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load the tokenizers and the scheduler of the pipeline in `folder`; use `load` to go from a config.

        Raises:
            EnvironmentProblem: the folder does not hold a pipeline of this class.
        """
        self.source, self.revision, self.device, self.dtype = source, revision, device, dtype
        if device.type == "cuda":  # cuDNN's backward pass gives NaN or a crash on Hopper (seen; pytorch/pytorch#196678)
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.vram_gb = vram_gb(config.vram, device)
        self._folder, self._held = folder, self.held(config)
        self._pipe = self._from_folder(**dict.fromkeys((self.prefix, "vae", *self.encoders)))
        self._files()  # a cut or missing file shows now, not after an hour
        self._parts: dict[str, Any] = {}
        self._encoded: dict[str, Conditioning] = {}
        self._near: dict[tuple[str, int], list[str]] = {}
        self._summed: dict[str, torch.Tensor] = {}
        self._expected: Callable[[], Sequence[str]] = tuple
        self._alone = False  # the encoders have made room for the denoiser
        self._sum = 0
        self._fingerprints: dict[tuple[str, ...] | None, str] = {}

    @classmethod
    def load(cls, config: BackboneConfig) -> Self:
        """Load from a local folder or the hub (downloaded once).

        Raises:
            EnvironmentProblem: the weights cannot be had; says why and what to do.
        """
        path = config.path or cls.path
        device = find_device(config.device)
        folder = cls.folder(config)
        dtype = cls.dtype_of(config, device)
        local = Path(path).expanduser()
        # A download lies in a folder that is named by its commit.
        source, revision = (local.resolve().name, "") if local.exists() else (path, folder.name)
        return cls(folder, config, source=source, revision=revision, device=device, dtype=dtype)

    @property
    def embedded_guidance(self) -> bool:
        """Whether a guidance scale is an input of the model."""
        return False

    @property
    def denoiser(self) -> Any:
        """The denoiser, frozen and in evaluation mode."""
        return self._part(self.prefix)

    @property
    def vae(self) -> Any:
        """The autoencoder, frozen and in evaluation mode."""
        return self._part("vae")

    def pipeline(self, *, encoders: bool = True, shared: bool = False) -> Any:
        """A fresh pipeline of the same base with weights of its own, on the backbone's device; its text encoders if needed.

        A `shared` one has no weights of its own: its denoiser and its VAE are the backbone's.

        Raises:
            EnvironmentProblem: a file is missing, broken or of another kind of model.
        """
        if not encoders:
            self._make_room()
        named = [self.prefix, "vae", *(self.encoders if encoders else ())]
        take = self._part if shared else self._load
        return self._from_folder(**(dict.fromkeys(self.encoders) | {name: take(name) for name in named}))

    def unchanged(self) -> bool:
        """Whether the denoiser, if it is loaded, still is what was loaded: the same tensors, with the same bits."""
        return self.prefix not in self._parts or _sum_of(self.denoiser) == self._sum

    def weight(self, module: str) -> torch.Tensor:
        """The weight of one linear layer of the denoiser (out, in), read from its file if the denoiser is not loaded."""
        if self.prefix in self._parts:
            return self.denoiser.get_submodule(module).weight.detach()  # type: ignore[no-any-return]
        return read_tensor(self._files(), f"{module}.weight").to(self.device)

    def fingerprint(self, modules: Sequence[str] | None = None) -> str:
        """SHA-256 over names, shapes and float32 values of the weights of some layers (of all the denoiser's tensors).

        Read from the files, so that it is the same whatever type the model was loaded in.
        """
        wanted = None if modules is None else tuple(sorted(modules))
        if wanted not in self._fingerprints:
            files, digest = self._files(), hashlib.sha256()
            for key in sorted(files) if wanted is None else [f"{module}.weight" for module in wanted]:
                tensor = read_tensor(files, key).float().contiguous()
                digest.update(f"{key}{tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().data)
            self._fingerprints[wanted] = digest.hexdigest()
        return self._fingerprints[wanted]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the pipeline's own `encode_prompt`, each once; what is encoded lies on the CPU.

        One prompt at a time: what a prompt encodes to must not depend on the batch that it comes in.

        Raises:
            ErasekitError: a new prompt comes after the encoders have made room for the denoiser.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
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
        pooled: torch.Tensor = encoder(ids.input_ids.to(encoder.device)).pooler_output
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
        """Pictures (b, 3, h, w) in [-1, 1]; works for `AutoencoderKL` and `AutoencoderTiny`."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        picture: torch.Tensor = self.vae.decode(x0 / config.scaling_factor + shift, return_dict=False)[0]
        return picture

    def release(self, part: Literal["text_encoders", "vae", "denoiser"]) -> None:
        """Free the memory of a part; encoded prompts stay, and the part is loaded again if it is used.

        The text encoders come back only where the denoiser does not need their room.
        """
        if part == "denoiser":
            self._alone = False
        for name in {"text_encoders": self.encoders, "vae": ("vae",), "denoiser": (self.prefix,)}[part]:
            dropped = self._parts.pop(name, None)
            if dropped is not None and self._held.weights == "whole":  # others may not be moved; they go when nobody holds them
                dropped.to("meta")
            if part == "text_encoders":
                setattr(self._pipe, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, prompt: str) -> Conditioning:
        """One prompt, encoded."""
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

    def _make_room(self) -> None:
        """Encode what is expected, and let the text encoders go, if there is no room for them beside the denoiser."""
        if self._held.encoders == "released" and not self._alone:
            self.encode(list(self._expected()))
            self.release("text_encoders")
            self._alone = True

    def _side(self, size: int) -> int:
        """The side of the latents of a picture of `size` pixels."""
        config = part_config(self._folder, "vae")
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        return size // int(2 ** (len(blocks) - 1))

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

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            if name == self.prefix:
                self._make_room()
            self._parts[name] = self._load(name)
            if name == self.prefix:
                self._sum = _sum_of(self._parts[name])
        return self._parts[name]

    def _class_of(self, name: str) -> Any:
        library, kind = json.loads((self._folder / "model_index.json").read_text())[name]
        return getattr(importlib.import_module(library), kind)

    def _load(self, name: str) -> Any:
        """A model of the pipeline, frozen and in evaluation mode, held as the size of the GPU allows."""
        model_class, main = self._class_of(name), name == self.prefix
        extra = {"quantization_config": self._nf4()} if main and self._held.weights == "nf4" else {}
        try:
            _, variant = tensor_files(self._folder / name)
            with quiet():
                model = model_class.from_pretrained(
                    self._folder, subfolder=name, torch_dtype=self.dtype, use_safetensors=True, variant=variant, **extra
                )
            if main and self._held.checkpointing:
                model.enable_gradient_checkpointing()
            if name == "vae" and self._held.slicing:
                model.enable_slicing()
            if main and self._held.weights == "offload":
                model.enable_group_offload(onload_device=self.device, offload_type="leaf_level")
            elif not extra:
                model.to("cpu" if name in self.encoders and self._held.encoders == "cpu" else self.device)
        except _LOADING as error:
            raise self._unloadable(error) from error
        return model.eval().requires_grad_(False)

    def _nf4(self) -> Any:
        """Four bits for all layers but those that read text, which a closed form edits.

        Raises:
            EnvironmentProblem: bitsandbytes is not installed.
        """
        check_nf4(self._held, self.vram_gb)
        skipped = [site.name for site in self.text_sites()]
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype, llm_int8_skip_modules=skipped
        )

    def text_sites(self) -> list[Site]:
        """The linear layers through which text enters."""
        raise NotImplementedError

    @cached_property
    def _linears(self) -> list[str]:
        """The denoiser's linear layers by the names they have without adapters; it is not loaded for them."""
        return list(skeleton(self._class_of(self.prefix), part_config(self._folder, self.prefix)))

    def _from_folder(self, **parts: Any) -> Any:
        """A pipeline from the folder, with the parts that are given instead of its own, None for leaving one out."""
        try:
            with quiet():
                pipe = self.pipeline_class.from_pretrained(
                    self._folder, dtype=self.dtype, use_safetensors=True, **dict.fromkeys(self.unused), **parts
                )
        except _LOADING as error:
            raise self._unloadable(error) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _unloadable(self, error: BaseException) -> EnvironmentProblem:
        kind = self.pipeline_class.__name__
        return EnvironmentProblem(f"'{self.source}' could not be loaded as a {kind}: {first_line(error)}")

    def _files(self) -> dict[str, Path]:
        """The file that holds each tensor of the denoiser, sharded or not."""
        try:
            return tensor_files(self._folder / self.prefix)[0]
        except (OSError, ValueError) as error:
            raise self._unloadable(error) from error

    @classmethod
    def folder(cls, config: BackboneConfig) -> Path:
        """The local folder of a diffusers pipeline; a hub id is downloaded.

        Raises:
            EnvironmentProblem: there is no such folder, or the download failed.
        """
        path = config.path or cls.path
        return local_folder(path) or download(cls.pipeline_class, path, config.revision, **dict.fromkeys(cls.unused))


def _sum_of(model: nn.Module) -> int:
    """A sum over the names and bits of all tensors: any adapter or changed weight shows, at the cost of reading each once."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = model.state_dict().items()
    sums = [(name, int(t.view(integer[t.element_size()]).sum(dtype=torch.int64))) for name, t in tensors]
    return hash(tuple(sums))
