"""Colors and markers of tensors, the same in every figure, with a contrast of at least 3:1 on the page of either theme."""

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
SCALE = "cividis"  # of heat maps: uniform in luminance, readable with color blindness
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
    """Return the palette entry of a tensor, `reference` if it has none."""
    return name if name in LIGHT else "reference"


def mark(name: str, interactive: bool = False) -> str:
    """Return the marker of a tensor for matplotlib or, if `interactive`, for plotly."""
    return MARKS.get(name, ("o", "circle"))[int(interactive)]
