"""A tensor has the same color in every figure, readable on white and on the dark page (at least 3:1 against it)."""

LIGHT = {
    "keys_pre_rope": "#1f5fbf",
    "keys": "#1f5fbf",
    "keys_post_rope": "#c2541b",
    "values": "#1a7f5a",
    "latent": "#7a4fb5",
    "key_rope_pre_rope": "#0b7a8f",
    "key_rope_post_rope": "#a8336e",
    "keys_nope": "#7d6a1c",
    "kv": "#a3324a",
    "reference": "#6a737d",
}
DARK = {
    "keys_pre_rope": "#7fb0ff",
    "keys": "#7fb0ff",
    "keys_post_rope": "#ff9e64",
    "values": "#5fd0a0",
    "latent": "#bf9bff",
    "key_rope_pre_rope": "#5ccfe6",
    "key_rope_post_rope": "#ff8cc2",
    "keys_nope": "#d9c15f",
    "kv": "#ff8fa3",
    "reference": "#9aa4af",
}
PAGE = {"light": "#ffffff", "dark": "#181c22"}  # what the figures lie on
SCALE = "cividis"  # of heat maps: even in luminance, safe for color-blind readers
MARKS = {  # matplotlib, plotly
    "keys_pre_rope": ("o", "circle"),
    "keys": ("o", "circle"),
    "keys_post_rope": ("s", "square"),
    "values": ("^", "triangle-up"),
    "latent": ("D", "diamond"),
    "key_rope_pre_rope": ("v", "triangle-down"),
    "key_rope_post_rope": ("P", "cross"),
    "keys_nope": ("X", "x"),
}


def tone(name: str) -> str:
    """The palette entry of a tensor; tensors this version has no color for share the reference tone."""
    return name if name in LIGHT else "reference"


def mark(name: str, interactive: bool = False) -> str:
    """The marker of a tensor, in the spelling of matplotlib or of plotly."""
    return MARKS.get(name, ("o", "circle"))[int(interactive)]
