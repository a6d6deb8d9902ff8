"""What the backbones over a diffusers pipeline share: where the files are, and parts that are loaded when first used."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import diffusers
import torch
from safetensors import SafetensorError
from torch import nn

from erasekit.backbone import BackboneConfig, Capabilities, Conditioning, Site, concatenate
from erasekit.builtin.shards import read_header, read_tensor
from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.events import progress
from erasekit.memory import VRAM_GB, Holding, vram_gb, weights_gb
from erasekit.quiet import quiet

_LOADING = (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError, RuntimeError)


class PipelineBackbone:
    """A backbone over a diffusers pipeline in a folder; its models are loaded when they are first used.

    A subclass with a `name`, a `domain` and a `path` of its own is another model of the same class.

    Attributes:
        path: hub id or local folder that is loaded if the config names none.
        pipeline_class: the diffusers pipeline.
        encoders: names of the pipeline's text encoders.
        unused: parts of the pipeline that erasekit never loads.
        scopes: {name: pattern of the denoiser's linear layers}.
        sampling: settings of a task's protocol that are other ones on this backbone.
        holding: how it is held on a GPU of each size.
        sizes_gb: of the denoiser, the text encoders and the VAE on the hub, at 16 bits.
        cpu_dtype: what `dtype = "auto"` means on a CPU.
        source: hub id, or the name of the local folder.
        revision: the commit on the hub, "" for a local folder.
    """

    name: ClassVar[str]
    domain: ClassVar[Literal["natural", "mini"]] = "natural"
    path: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    prefix: ClassVar[str]
    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    pipeline_class: ClassVar[Any]
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    unused: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[Mapping[str, str]]
    sampling: ClassVar[Mapping[str, Any]] = {}
    holding: ClassVar[Mapping[int, Holding]] = dict.fromkeys(VRAM_GB, Holding()) | {8: Holding(checkpointing=True)}
    sizes_gb: ClassVar[tuple[float, float, float]]
    cpu_dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(
        self, folder: Path, config: BackboneConfig, *, source: str, revision: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Load the tokenizers and the scheduler of the pipeline in `folder`; use `load` to go from a config.

        Raises:
            EnvironmentProblem: the folder does not hold a pipeline of this class.
        """
        self.source, self.revision, self.device, self.dtype = source, revision, device, dtype
        self.vram_gb = vram_gb(config.vram, device)
        self._folder, self._held = folder, self.holding[self.vram_gb]
        self._pipe = self._from_folder(**dict.fromkeys((self.prefix, "vae", *self.encoders)))
        self._files()  # a cut or missing file shows now, not after an hour
        self._parts: dict[str, Any] = {}
        self._encoded: dict[str, Conditioning] = {}
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
        if config.dtype != "auto":
            dtype: torch.dtype = getattr(torch, config.dtype)
        else:
            dtype = cls.cpu_dtype if device.type == "cpu" else torch.bfloat16
        local = Path(path).expanduser()
        # A download lies in a folder that is named by its commit.
        source, revision = (local.resolve().name, "") if local.exists() else (path, folder.name)
        return cls(folder, config, source=source, revision=revision, device=device, dtype=dtype)

    @classmethod
    def weights_gb(cls, config: BackboneConfig) -> float:
        """About how many GB of weights are held at once under these settings; nothing is loaded or downloaded for it."""
        device = find_device(config.device)
        folder = Path(config.path or cls.path).expanduser()
        parts = (cls.prefix,), cls.encoders, ("vae",)
        files = [[f for name in names for f in (folder / name).glob("*.safetensors")] for names in parts]
        on_disk = tuple(sum(f.stat().st_size for f in found) / 2**30 for found in files)
        width = 2 if config.dtype == "float32" or (config.dtype == "auto" and device.type == "cpu") else 1
        denoiser, encoders, rest = (width * gb for gb in (on_disk if folder.is_dir() else cls.sizes_gb))
        return weights_gb(cls.holding[vram_gb(config.vram, device)], denoiser, encoders, rest)

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

    def pipeline(self, *, encoders: bool = True) -> Any:
        """A fresh pipeline of the same base with weights of its own, on the backbone's device; its text encoders if needed.

        Raises:
            EnvironmentProblem: a file is missing, broken or of another kind of model.
        """
        named = (self.prefix, *(self.encoders if encoders else ()))
        return self._from_folder(**(dict.fromkeys(self.encoders) | {name: self._load(name) for name in named}))

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
        """Encode prompts with the pipeline's own `encode_prompt`, each once.

        One prompt at a time: what a prompt encodes to must not depend on the batch that it comes in.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        for i, prompt in enumerate(missing):
            progress("encoding", i, len(missing))
            for name in self.encoders:
                setattr(self._pipe, name, self._part(name))
            with torch.no_grad(), quiet():
                self._encoded[prompt] = self._encode(prompt).to(self.device, self.dtype)
        if missing:
            progress("encoding", len(missing), len(missing))
        if not prompts:
            return self.encode([""])[:0]
        return concatenate([self._encoded[prompt] for prompt in prompts])

    def vocabulary(self, near: str, n: int) -> list[str]:
        """The `n` whole words of the CLIP tokenizer that its encoder embeds nearest to the words of a text, nearest first.

        Pieces that end many words and begin hardly any ("lly", "tion") are none.
        """
        tokenizer, encoder = self._pipe.tokenizer, self._part(self.encoders[0])
        whole = {token: i for token, i in tokenizer.get_vocab().items() if re.fullmatch("[a-z]{3,}</w>", token)}
        pieces = fragments(tokenizer.get_vocab())
        whole = {token: i for token, i in whole.items() if token.removesuffix("</w>") not in pieces}
        table = nn.functional.normalize(encoder.get_input_embeddings().weight.detach().float(), dim=1)
        own = table[tokenizer(near, add_special_tokens=False).input_ids]
        nearness = (table[list(whole.values())] @ own.T).amax(1)
        words = [token.removesuffix("</w>") for token in whole]
        return [words[i] for i in nearness.argsort(descending=True)[:n].tolist()]

    @torch.no_grad()
    def summaries(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the CLIP encoder makes of each prompt as a whole (n, width), float64 on the CPU; no other encoder runs."""
        tokenizer, encoder = self._pipe.tokenizer, self._part(self.encoders[0])
        ids = tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
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
        """Free the memory of a part; encoded prompts stay, and the part is loaded again if it is used."""
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

    def _side(self, size: int) -> int:
        """The side of the latents of a picture of `size` pixels."""
        config = json.loads((self._folder / "vae" / "config.json").read_text())
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
            if name == self.prefix and self._held.encoders == "released":
                self.release("text_encoders")
            self._parts[name] = self._load(name).eval().requires_grad_(False)
        return self._parts[name]

    def _load(self, name: str) -> Any:
        """A model of the pipeline, held as the size of the GPU allows."""
        library, kind = json.loads((self._folder / "model_index.json").read_text())[name]
        model_class = getattr(importlib.import_module(library), kind)
        main = name == self.prefix
        extra = {"quantization_config": self._nf4()} if main and self._held.weights == "nf4" else {}
        try:
            with quiet():
                model = model_class.from_pretrained(
                    self._folder, subfolder=name, torch_dtype=self.dtype, use_safetensors=True, **extra
                )
            if main and self._held.checkpointing:
                model.enable_gradient_checkpointing()
            if main and self._held.weights == "offload":
                model.enable_group_offload(onload_device=self.device, offload_type="leaf_level")
            elif not extra:
                model.to("cpu" if name in self.encoders and self._held.encoders == "cpu" else self.device)
        except _LOADING as error:
            raise self._unloadable(error) from error
        return model

    def _nf4(self) -> Any:
        """Four bits for all layers but those that read text, which a closed form edits.

        Raises:
            EnvironmentProblem: bitsandbytes is not installed.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise EnvironmentProblem(f"--vram {self.vram_gb} needs bitsandbytes: pip install 'erasekit[nf4]'.")
        skipped = [site.name for site in self.text_sites()]
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype, llm_int8_skip_modules=skipped
        )

    def text_sites(self) -> list[Site]:
        """The linear layers through which text enters."""
        raise NotImplementedError

    @cached_property
    def _linears(self) -> list[str]:
        """The denoiser's linear layers by the names they have without adapters: those are put around layers."""
        names = (name for name, module in self.denoiser.named_modules() if isinstance(module, nn.Linear))
        return [name.removesuffix(".base_layer") for name in names if ".lora_" not in name]

    def _from_folder(self, **parts: Any) -> Any:
        """A pipeline from the folder, with the parts that are given instead of its own, None for leaving one out."""
        try:
            with quiet():
                pipe = self.pipeline_class.from_pretrained(
                    self._folder, dtype=self.dtype, use_safetensors=True, **dict.fromkeys(self.unused), **parts
                )
            if getattr(pipe, "vae", None) is not None:
                pipe.vae.to(self.device)
        except _LOADING as error:
            raise self._unloadable(error) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _unloadable(self, error: BaseException) -> EnvironmentProblem:
        kind = self.pipeline_class.__name__
        return EnvironmentProblem(f"'{self.source}' could not be loaded as a {kind}: {first_line(error)}")

    def _files(self) -> dict[str, Path]:
        """The file that holds each tensor of the denoiser, sharded or not, of the main variant."""
        folder, name = self._folder / self.prefix, "diffusion_pytorch_model"
        paths = sorted(folder.glob(f"{name}-*-of-*.safetensors")) or [folder / f"{name}.safetensors"]
        where: dict[str, Path] = {}
        try:
            for path in paths:
                where.update(dict.fromkeys(read_header(path)[0], path))
        except (OSError, ValueError) as error:
            raise self._unloadable(error) from error
        return where

    @classmethod
    def folder(cls, config: BackboneConfig) -> Path:
        """The local folder of a diffusers pipeline; a hub id is downloaded.

        Raises:
            EnvironmentProblem: there is no such folder, or the download failed.
        """
        path = config.path or cls.path
        folder = Path(path).expanduser()
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise EnvironmentProblem(
                    f"'{path}' has no model_index.json; 'backbone.path' needs a diffusers folder or a hub id."
                )
            return folder
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise EnvironmentProblem(f"There is no folder '{path}'; 'backbone.path' needs a diffusers folder or a hub id.")
        return cls._download(path, config.revision)

    @classmethod
    def _download(cls, repo: str, revision: str | None) -> Path:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            # Parts that are given (as None) are not downloaded.
            parts: dict[str, Any] = dict.fromkeys(cls.unused)
            return Path(cls.pipeline_class.download(repo, revision=revision, use_safetensors=True, **parts))
        except GatedRepoError as error:
            raise EnvironmentProblem(
                f"{repo} is gated: accept its licence at huggingface.co/{repo}, then run 'hf auth login'."
            ) from error
        except RevisionNotFoundError as error:
            raise EnvironmentProblem(f"{repo} has no revision '{revision}'; check 'backbone.revision'.") from error
        except RepositoryNotFoundError as error:
            raise EnvironmentProblem(
                f"The hub has no repository '{repo}', or it is private: check the name, or run 'hf auth login'."
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise EnvironmentProblem(
                f"'{repo}' could not be downloaded ({first_line(error)}). "
                f"Check the network, or give a local folder: -s backbone.path=FOLDER"
            ) from error


def fragments(tokens: Iterable[str]) -> set[str]:
    """Tokens of a byte-pair vocabulary that end a word, but are no words: over four times as many end in them as begin."""
    bare = {token.removesuffix("</w>") for token in tokens}
    words = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
    ends = Counter(word[k:] for word in words for k in range(1, len(word) - 2))
    begins = Counter(token[:k] for token in bare for k in range(3, len(token)))
    return {word for word in words if ends[word] > 4 * (1 + begins[word])}


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one.

    Raises:
        EnvironmentProblem: this machine has no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(
            f"Device '{name}' cannot be used ({first_line(error)}); 'backbone.device' takes auto, cpu, cuda, cuda:1, mps."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
