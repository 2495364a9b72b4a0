"""How the page looks and behaves in the browser: theme, style sheet, script.

Nothing is fetched from elsewhere: the fonts are the ones that Gradio brings along. Its bundled
semi-bold faces lack most letters, so the two weights that are whole are asked for by name, and
the greys and reds are dark enough for WCAG's contrast AA, light and dark.
"""

from __future__ import annotations

from pathlib import Path

from gradio import themes

HERE = Path(__file__).resolve().parent
STYLE = HERE / "app.css"
SCRIPT = HERE / "app.js"
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "style-src 'self' 'unsafe-inline'",
        # Gradio starts from an inline script and compiles the templates of its components.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "font-src 'self' data:",
        "connect-src 'self'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
"""Whatever an answer holds, the browser asks no other host for it."""


def theme() -> themes.Base:
    fonts = [themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
    red = "#b91c1c"
    return themes.Default(
        primary_hue=themes.colors.blue, neutral_hue=themes.colors.slate, font=fonts
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_cancel_background_fill=red,
        button_cancel_background_fill_dark=red,
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_hover_dark="#991b1b",
        button_cancel_text_color="white",
        button_large_text_weight="700",
        button_medium_text_weight="700",
        button_small_text_weight="400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_weight="400",
        block_title_text_weight="400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def head() -> str:
    """What stands in the page's head: our script, in the page itself."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"
