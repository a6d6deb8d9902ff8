"""FLUX.2 [klein]: a rectified-flow transformer whose one entrance of text reads three layers of a language model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from erasekit.backbones.chat import Chat
from erasekit.backbones.memory import Activations, Holding
from erasekit.backbones.mmdit import Mmdit
from erasekit.backbones.protocol import BackboneConfig, Capabilities, Conditioning, Lexicon, Site
from erasekit.backbones.schedule import Schedule, flow_sigma, flow_tau
from erasekit.errors import EnvironmentProblem

ENCODER = "text_encoder"
READER = "Qwen3ForCausalLM"
LAYERS = (9, 18, 27)  # of Qwen3, whose states are what a token is encoded as, side by side


class Flux2KleinBase4B(Mmdit):
    """FLUX.2 [klein] 4B, undistilled. Latents are packed, (b, tokens, 128): 2 x 2 latent pixels each, normalised.

    Qwen3 reads a prompt as what a user says in a chat: the template's words stand before and behind it, and then pads. Text
    tokens have places of their own, on the last of four axes.
    """

    name: ClassVar[str] = "flux2-klein-base-4b"
    path: ClassVar[str] = "black-forest-labs/FLUX.2-klein-base-4B"
    licence: ClassVar[Mapping[str, str]] = {"license": "apache-2.0"}
    distilled: ClassVar[bool] = False
    capabilities: ClassVar[Capabilities] = Capabilities(family="dit", prediction="velocity", guidance="cfg", text="causal")
    pipeline_class: ClassVar[str] = "Flux2KleinPipeline"
    unused: ClassVar[tuple[str, ...]] = ()
    # The blocks of a single stream have one layer for queries, keys, values and the way into the MLP, and one for the ways out.
    scopes: ClassVar[Mapping[str, str]] = {
        **Mmdit.scopes,
        "all_attn": r"\.attn\.(to_[qkv]|to_qkv_mlp_proj|to_out(\.0)?|add_[qkv]_proj|to_add_out)$",
        "text": r"^context_embedder$",
    }
    size: ClassVar[int] = 1024
    positions: ClassVar[int] = 512
    measured: ClassVar[tuple[int, int, Activations]] = (
        1024,
        512,
        Activations(forward=0.6, kept=13.8, checkpointed=1.72, maps=12.4, decode=1.55),
    )
    sampling: ClassVar[Mapping[str, Any]] = {
        "sampler": "default",
        "steps": 50,
        "guidance": 4.0,
        "size": size,
        "batch": 2,  # images; each is two rows of 4,600 tokens
    }
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(1, "nf4", "cpu", checkpointing=True, slicing=True),
        12: Holding(1, "nf4", "released", checkpointing=True, slicing=True),
        16: Holding(2, "whole", "released", checkpointing=True, slicing=True),
        24: Holding(4, "whole", "released", checkpointing=True, slicing=True),
        32: Holding(8, "whole", "released", checkpointing=True),
        48: Holding(8, "whole", "kept", checkpointing=True),
        80: Holding(16, "whole", "kept", checkpointing=True),
        141: Holding(16, "whole", "kept"),
    }
    on_cpu: ClassVar[Holding] = Holding(1, "whole", "released", checkpointing=True)
    sizes_gb: ClassVar[tuple[float, float, float]] = (7.22, 7.49, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    )

    def __init__(self, folder: Path, config: BackboneConfig, **where: Any) -> None:
        """See `PipelineBackbone`."""
        super().__init__(folder, config, **where)
        self._length = min(self.positions, self._pipe.tokenizer.model_max_length)
        try:
            self._chat = Chat(self._pipe.tokenizer, self._length)
        except ValueError as error:
            raise self._unloadable(error) from error

    @property
    def embedded_guidance(self) -> bool:
        """Whether guidance is distilled into the model; it is told no scale even then."""
        return self.distilled

    def text_sites(self) -> list[Site]:
        """The one entrance of text; it has no bias."""
        return [Site("context_embedder", "tokens")]

    def spans(self, prompt: str, phrase: str) -> list[range]:
        """Token positions at which `phrase` stands in `prompt` as whole words, in upper or lower case."""
        return self._chat.spans(prompt, phrase)

    def schedule(self, steps: int, size: int | None = None) -> Schedule:
        """The steps of the pipeline's own scheduler, shifted by the numbers of image tokens and of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        scheduler = self._pipe.scheduler
        shift = compute_empirical_mu(image_seq_len=self._tokens(size) ** 2, num_steps=steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
        return Schedule(timesteps=scheduler.timesteps.clone(), tau=flow_tau(scheduler.sigmas[:-1]))

    def latents(self, seeds: Sequence[int], size: int | None = None) -> torch.Tensor:
        """Initial noise (n, tokens, channels), the same as the pipeline draws for CPU generators with these seeds."""
        side = self._tokens(size)
        return self._packed(self._noise(seeds, (self._channels, side, side)))

    @classmethod
    def tflop(cls, size: int) -> float:
        """About how many TFLOP a forward pass of one row is: of weights, each stream's in its turn, and of attention."""
        config, image = cls.architecture[1], (size // 16) ** 2
        width, text = 128 * config["num_attention_heads"], cls.positions
        layers = config["num_layers"] + config["num_single_layers"]
        tokens = image + text
        entrances = 2 * 128 * width * image + config["joint_attention_dim"] * width * text
        return float(2e-12 * (13 * width**2 * layers * tokens + entrances + 2 * width * layers * tokens**2))

    def lexicon(self, encoder: str) -> Lexicon:
        """The tokens of Qwen3, on the device that it is on; what its chats are made with cannot be typed."""
        tokenizer, vectors = self._pipe.tokenizer, self._part(encoder).get_input_embeddings().weight.detach()
        usable = torch.zeros(len(vectors), dtype=torch.bool)
        usable[[i for i in tokenizer.get_vocab().values() if i < len(vectors)]] = True
        usable[[i for i in (*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids) if i < len(vectors)]] = False
        return Lexicon(vectors, usable, begin=self._chat.begin, end=self._chat.end, pad=tokenizer.pad_token_id, spaced=True)

    def spell(self, encoder: str, ids: torch.Tensor) -> str:
        """The text of one prompt's ids (length,) without the template and pads."""
        return self._chat.spell(ids)

    def embed(
        self,
        tokens: Mapping[str, torch.Tensor],
        vectors: Mapping[str, torch.Tensor] | None = None,
        *,
        like: Conditioning | None = None,
    ) -> Conditioning:
        """Encode token ids, differentiable in `vectors`; see `Backbone`."""
        if ENCODER not in tokens:
            assert like is not None, "There is one text encoder, and it has no tokens."
            return like.to(self.device, self.dtype)
        ids = tokens[ENCODER].cpu()
        mask = self._chat.unpadded(ids).to(self._part(ENCODER).device)
        states = self._states(ids, vectors, attention_mask=mask).to(self.device, self.dtype)
        return Conditioning(states, None, ids, self._chat.lengths(ids))

    def vocabulary(self, near: str, n: int) -> list[str]:
        """The `n` words that begin with a space in the tokenizer and that the encoder's table holds nearest to those of a text.

        A byte-pair token with a space before it is a word, or the beginning of longer ones ("interp"), which nothing tells.
        """
        if (near, n) not in self._near:
            self._refuse_late(near)
            tokenizer, encoder = self._pipe.tokenizer, self._part(ENCODER)
            whole = {token[1:]: i for token, i in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{3,}", token)}
            table = torch.nn.functional.normalize(encoder.get_input_embeddings().weight.detach().float(), dim=1)
            own = table[tokenizer(f" {near}").input_ids]
            nearest = (table[list(whole.values())] @ own.T).amax(1).argsort(descending=True)
            words = list(whole)
            self._near[near, n] = [words[i] for i in nearest[:n].tolist()]
        return self._near[near, n]

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """Finished latents (n, tokens, channels) of images (n, 3, h, w) in [-1, 1]: the mode of what the VAE gives, packed."""
        with torch.no_grad():
            mode = self.vae.encode(images.to(self.device, self.dtype)).latent_dist.mode()
        patches = self._pipe._patchify_latents(mode)
        mean, deviation = self._normal(patches)
        return self._packed((patches - mean) / deviation)

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1] of packed latents."""
        side = round(x0.shape[1] ** 0.5)
        patches = x0.transpose(1, 2).unflatten(2, (side, side))
        mean, deviation = self._normal(patches)
        image: torch.Tensor = self.vae.decode(self._pipe._unpatchify_latents(patches * deviation + mean), return_dict=False)[0]
        return image

    def call_arguments(self, cond: Conditioning, *, empty: Conditioning, guidance: float) -> dict[str, Any]:
        """Arguments of the pipeline's call for encoded prompts; a distilled model has no use for a scale and warns of one."""
        cond, none = (c.to(self.device, self.dtype) for c in (cond, empty.repeat(len(cond))))
        if self.distilled:
            return {"prompt_embeds": cond.tokens, "guidance_scale": 1.0}
        return {"prompt_embeds": cond.tokens, "negative_prompt_embeds": none.tokens, "guidance_scale": guidance}

    def _predict(self, x: torch.Tensor, tau: torch.Tensor, cond: Conditioning, guidance: float) -> torch.Tensor:
        """Velocity (b, tokens, channels); square images only. No model of the family is told a scale."""
        side = round(x.shape[1] ** 0.5)
        velocity: torch.Tensor = self.denoiser(
            hidden_states=x,
            timestep=(flow_sigma(tau) * 1000).to(x) / 1000,
            guidance=None,
            encoder_hidden_states=cond.tokens,
            txt_ids=self._pipe._prepare_text_ids(cond.tokens[:1]).to(x.device),
            img_ids=self._pipe._prepare_latent_ids(x.new_empty(1, 1, side, side)).to(x.device),
            return_dict=False,
        )[0]
        return velocity

    def _tokens_of(self, x: torch.Tensor) -> int:
        return x.shape[1]

    def _packed(self, patches: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self._pipe._pack_latents(patches)
        return packed

    def _normal(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the patches of latents, (1, channels, 1, 1), from the VAE's batch norm."""
        mean, variance = (getattr(self.vae.bn, key).view(1, -1, 1, 1) for key in ("running_mean", "running_var"))
        return mean.to(like), torch.sqrt(variance + self.vae.config.batch_norm_eps).to(like)

    def _check_index(self) -> None:
        """See that the folder's prompts are read by Qwen3, and that it is distilled, or not, as the class is.

        Raises:
            EnvironmentProblem: it is another model of the family.
        """
        super()._check_index()
        index = json.loads((self._folder / "model_index.json").read_text())
        if index[ENCODER][1] != READER:
            line = f"'{self.source}' reads prompts with {index[ENCODER][1]}, not {READER}"
            raise EnvironmentProblem(f"{line}. FLUX.2 [klein] is what erasekit knows of the family; check 'backbone.path'.")
        if bool(index.get("is_distilled")) != self.distilled:
            kinds = ("undistilled (base)", "distilled")
            found, wanted = kinds[not self.distilled], kinds[self.distilled]
            raise EnvironmentProblem(
                f"'{self.source}' is {found}, and '{self.name}' is {wanted}. Check 'backbone.path', or choose the other one."
            )

    def _tokenizer(self, encoder: str) -> tuple[Any, int]:
        return self._pipe.tokenizer, self._length

    def _tokenized(self, prompt: str, tokenizer: Any, length: int) -> dict[str, torch.Tensor]:
        ids = self._chat.ids(prompt)
        return {"ids": ids, "lengths": self._chat.lengths(ids)}

    def _states(self, ids: torch.Tensor, vectors: Mapping[str, torch.Tensor] | None = None, **how: Any) -> torch.Tensor:
        """The states (n, length, 3 x width) of the layers that count, side by side."""
        asked = {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 1}
        out = self._read(ENCODER, ids, vectors, **asked, **how)
        return torch.cat([out.hidden_states[k] for k in LAYERS], -1)

    @torch.no_grad()
    def _summarise(self, prompts: Sequence[str]) -> torch.Tensor:
        """The states at the end token, which has read the whole prompt; pads, which it cannot see, are left out."""
        rows = []
        for prompt in prompts:
            ids = self._tokenized(prompt, *self._tokenizer(ENCODER))
            upto = int(ids["lengths"][0])
            rows.append(self._states(ids["ids"][:, :upto])[0, -1].double().cpu())
        return torch.stack(rows)

    def _encode(self, prompt: str) -> Conditioning:
        tokens, _ = self._pipe.encode_prompt(
            prompt, device=self._pipe.text_encoder.device, max_sequence_length=self._length, text_encoder_out_layers=LAYERS
        )
        return Conditioning(tokens=tokens, pooled=None, **self._tokenized(prompt, *self._tokenizer(ENCODER)))


class Flux2Klein4B(Flux2KleinBase4B):
    """FLUX.2 [klein] 4B: four steps, guidance distilled into it."""

    name: ClassVar[str] = "flux2-klein-4b"
    path: ClassVar[str] = "black-forest-labs/FLUX.2-klein-4B"
    distilled: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(family="dit", prediction="velocity", guidance="embedded", text="causal")
    sampling: ClassVar[Mapping[str, Any]] = {
        "sampler": "default",
        "steps": 4,
        "guidance": 1.0,
        "size": Flux2KleinBase4B.size,
    }


class Flux2KleinBase9B(Flux2KleinBase4B):
    """FLUX.2 [klein] 9B, undistilled; its Qwen3 has 8 B parameters."""

    name: ClassVar[str] = "flux2-klein-base-9b"
    path: ClassVar[str] = "black-forest-labs/FLUX.2-klein-base-9B"
    licence: ClassVar[Mapping[str, str]] = {"license": "other", "license_name": "flux-non-commercial-license"}
    measured: ClassVar[tuple[int, int, Activations]] = (
        1024,
        512,
        Activations(forward=0.8, kept=23.4, checkpointed=2.53, maps=26.8, decode=1.55),
    )
    holding: ClassVar[Mapping[int, Holding]] = {
        8: Holding(1, "offload", "cpu", checkpointing=True, slicing=True),
        12: Holding(1, "nf4", "cpu", checkpointing=True, slicing=True),
        16: Holding(2, "nf4", "cpu", checkpointing=True, slicing=True),
        24: Holding(4, "nf4", "released", checkpointing=True, slicing=True),
        32: Holding(2, "whole", "released", checkpointing=True, slicing=True),
        48: Holding(4, "whole", "released", checkpointing=True),
        80: Holding(8, "whole", "kept", checkpointing=True),
        141: Holding(8, "whole", "kept"),
    }
    sizes_gb: ClassVar[tuple[float, float, float]] = (16.9, 15.26, 0.16)
    architecture: ClassVar[tuple[str, Mapping[str, Any]]] = (
        "Flux2Transformer2DModel",
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    )


class Flux2Klein9B(Flux2KleinBase9B):
    """FLUX.2 [klein] 9B: four steps, guidance distilled into it."""

    name: ClassVar[str] = "flux2-klein-9b"
    path: ClassVar[str] = "black-forest-labs/FLUX.2-klein-9B"
    distilled: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Flux2Klein4B.capabilities
    sampling: ClassVar[Mapping[str, Any]] = Flux2Klein4B.sampling
