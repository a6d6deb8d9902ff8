"""The page of `erasekit play`, made with gradio: type a prompt, see the base beside the erased model."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator
from typing import Any

from PIL.Image import Image

from erasekit.errors import EnvironmentProblem, UsageError
from erasekit.runs.playground import Drawn, Playground

STRONGEST = 1.5
CSS = """
.drawn { margin: 0; max-width: 768px; }
.drawn figcaption { font-weight: 600; padding: 4px 0; }
.drawn img, .drawn div { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 4px; }
.drawn div { border: 1px dashed var(--border-color-primary); }
"""  # images fill their column: those of the mini models have 64 pixels


def gradio() -> Any:
    """The module, told to tell nothing to anybody.

    Raises:
        EnvironmentProblem: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as found
    except ImportError as error:
        raise EnvironmentProblem("The playground needs gradio: pip install 'erasekit[play]'.") from error
    return found


def page(playground: Playground) -> Any:
    """The gradio application, not started."""
    gr = gradio()
    sides, base = playground.sides, playground.sides[0].erasure.base["repo"]
    with gr.Blocks(title="erasekit play", analytics_enabled=False) as app:
        gr.Markdown(f"# {', '.join(c.name for c in sides[0].erasure.concepts)}, erased from {base}")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", placeholder="a photo of a cat", scale=4)
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, scale=1)
            button = gr.Button("Draw", variant="primary", scale=1)
        inputs: list[Any] = [prompt, seed]
        with gr.Row(equal_height=True):
            titles = [f"base: {base}", *(side.title for side in sides)]
            with gr.Column():
                outputs = [gr.HTML(_figure(titles[0]))]
            for side in sides:
                with gr.Column():
                    outputs.append(gr.HTML(_figure(side.title)))
                    inputs.append(gr.Checkbox(label="erased", value=True))
                    for name in side.names:
                        inputs.append(gr.Slider(0, STRONGEST, value=1, step=0.05, label=f"strength: {name}"))
        note = gr.Markdown()

        def draw(text: str, number: float, *controls: Any) -> Iterator[tuple[Any, ...]]:
            """Each image as soon as it is there."""
            drawn: list[Drawn] = []
            try:
                for done in _images(playground, text, int(number or 0), controls):
                    drawn.append(done)
                    shown = [_figure(title, one.image) for title, one in zip(titles, drawn, strict=False)]
                    yield (*shown, *[gr.skip()] * (len(outputs) - len(shown)), _note(drawn))
            except UsageError as error:
                raise gr.Error(str(error), print_exception=False) from error

        for event in (button.click, prompt.submit, *(control.input for control in inputs[2:])):
            event(draw, inputs, [*outputs, note], concurrency_limit=1, show_progress="minimal", trigger_mode="always_last")
    return app


def _images(playground: Playground, prompt: str, seed: int, controls: tuple[Any, ...]) -> Iterator[Drawn]:
    """The image of the base and that of each erasure; `controls` are a switch and the strengths of each."""
    left = list(controls)
    yield (base := playground.draw(prompt, seed))
    for i, side in enumerate(playground.sides):
        on, strengths = left[0], left[1 : 1 + len(side.names)]
        left = left[1 + len(side.names) :]
        if on:
            yield playground.draw(prompt, seed, i, dict(zip(side.names, map(float, strengths), strict=True)))
        else:
            yield base


def _figure(title: str, image: Image | None = None) -> str:
    """An image with its title, or the place where it will be: gradio's own has no text for those who cannot see it."""
    title = html.escape(title)
    shown = "<div></div>"
    if image is not None:
        image.save(file := io.BytesIO(), format="PNG")
        shown = f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
    return f'<figure class="drawn"><figcaption>{title}</figcaption>{shown}</figure>'


def _note(drawn: list[Drawn]) -> str:
    """How long the images took, and whether they are blurred."""
    times = ", ".join(f"{one.seconds:.1f}" for one in drawn)
    hidden = " Blurred, since it may be explicit: `erasekit play --reveal` shows it." if any(d.blurred for d in drawn) else ""
    return f"{times} s.{hidden}"


def serve(app: Any, *, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        EnvironmentProblem: the port is taken.
    """
    gr = gradio()
    # In the default theme the button's text and the pale ones are too weak to be read, and the fonts are asked of a server.
    strong = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    strong |= {f"button_primary_background_fill{state}": "*primary_700" for state in ("", "_dark", "_hover", "_hover_dark")}
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    try:
        app.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            footer_links=[],
            css=CSS,
            theme=gr.themes.Base(**fonts).set(**strong),
            prevent_thread_lock=False,
            enable_monitoring=False,
        )
    except OSError as error:
        raise EnvironmentProblem(f"Port {port} of {host} cannot be used. Choose another one with --port.") from error
