"""The parts of a diffusers pipeline: where their files are, loaded when first used, released when their room is needed."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from torch import nn

from erasekit.backbones.folders import download, first_line, local_folder, part_config, tensor_files
from erasekit.backbones.held import HeldPipeline, check_nf4, find_device, of_diffusers, skeleton
from erasekit.backbones.memory import vram_gb
from erasekit.backbones.protocol import BackboneConfig, Conditioning, Site
from erasekit.backbones.shards import read_tensor
from erasekit.errors import EnvironmentProblem
from erasekit.quiet import quiet

_LOADING = (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError, RuntimeError)


class PipelineParts(HeldPipeline):
    """A diffusers pipeline in a folder; its models are loaded when they are first used.

    Attributes:
        pipeline_class: the name of the pipeline's class in diffusers.
        unused: parts of the pipeline that erasekit never loads.
        source: hub id, or the name of the local folder.
        revision: the commit on the hub, "" for a local folder.
    """

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    pipeline_class: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()

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
        self._check_index()
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
            EnvironmentProblem: the weights cannot be loaded; says why and what to do.
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

    def keep_encoders(self) -> None:
        """Keep the text encoders, in RAM where the denoiser needs their room, for prompts that go on coming."""
        if self._held.encoders == "released":
            self._held = self._held._replace(encoders="cpu")

    def unchanged(self) -> bool:
        """Whether the denoiser, if it is loaded, still is what was loaded: the same tensors, with the same bits."""
        return self.prefix not in self._parts or _sum_of(self.denoiser) == self._sum

    def renew(self) -> None:
        """Be as if just loaded, for another run: a denoiser that was changed is loaded anew, and prompts can be encoded."""
        if self._alone or not self.unchanged():
            self.release("denoiser")
        self._expected = tuple

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

    def _check_index(self) -> None:
        """See that the folder has all text encoders, and a denoiser of the right class.

        Raises:
            EnvironmentProblem: it has not.
        """
        index = json.loads((self._folder / "model_index.json").read_text())
        for name in self.encoders:
            if index[name][1] is None:
                line = f"'{self.source}' comes without '{name}', with which a {self.pipeline_class} reads prompts"
                raise EnvironmentProblem(f"{line}. Give a folder that has it.")
        wanted, found = self.architecture[0], index[self.prefix][1]
        if found != wanted:
            line = f"'{self.source}' is another kind of model: its {self.prefix} is of the class {found}, not {wanted}"
            raise EnvironmentProblem(f"{line}. Check 'backbone.path'.")

    def _make_room(self) -> None:
        """Encode what is expected, and let the text encoders go, if there is no room for them beside the denoiser."""
        if self._held.encoders == "released" and not self._alone:
            self.encode(list(self._expected()))
            self.release("text_encoders")
            self._alone = True

    def _noise(self, seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Noise (n, *shape), the same as the pipeline draws for CPU generators with these seeds."""
        rows = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=self.dtype) for seed in seeds]
        return torch.cat(rows).to(self.device)

    def _side(self, size: int) -> int:
        """The side of the latents of an image of `size` pixels."""
        config = part_config(self._folder, "vae")
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        return size // int(2 ** (len(blocks) - 1))

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
        return of_diffusers("BitsAndBytesConfig")(
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
                pipe = of_diffusers(self.pipeline_class).from_pretrained(
                    self._folder, dtype=self.dtype, use_safetensors=True, **dict.fromkeys(self.unused), **parts
                )
        except _LOADING as error:
            raise self._unloadable(error) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _unloadable(self, error: BaseException) -> EnvironmentProblem:
        kind = self.pipeline_class
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
        return local_folder(path) or download(
            of_diffusers(cls.pipeline_class), path, config.revision, **dict.fromkeys(cls.unused)
        )

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; see `Backbone`."""
        raise NotImplementedError


def _sum_of(model: nn.Module) -> int:
    """A sum over the names and bits of all tensors: any adapter or changed weight shows, at the cost of reading each once."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = model.state_dict().items()
    sums = [(name, int(t.view(integer[t.element_size()]).sum(dtype=torch.int64))) for name, t in tensors]
    return hash(tuple(sums))
