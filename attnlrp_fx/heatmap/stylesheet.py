"""The CSS of the HTML: fixed layout, and a class a colour step for light and dark pages."""

from __future__ import annotations

from functools import cache

from attnlrp_fx.heatmap.scale import DARK, LIGHT, OVERLAY, RGB, STEPS, hex_colour, ink

_LAYOUT = """\
.attnlrp{color-scheme:light dark;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,\
"Helvetica Neue",Arial,sans-serif;color:#1f2328;color:light-dark(#1f2328,#e6e8ec);\
background:#fff;background:light-dark(#fff,#1b1d22);padding:4px 16px;border-radius:8px;\
max-width:72em;text-align:start;font-variant-numeric:tabular-nums}
[data-jp-theme-light="true"] .attnlrp,.vscode-light .attnlrp{color-scheme:light}
[data-jp-theme-light="false"] .attnlrp,.vscode-dark .attnlrp,html[theme="dark"] .attnlrp\
{color-scheme:dark}
.attnlrp section{padding:12px 0}
.attnlrp section+section{border-top:1px solid #d8dbe0;border-color:light-dark(#d8dbe0,#3a3e46)}
.attnlrp h4{margin:0;font-size:15px;font-weight:600}
.attnlrp header{display:flex;flex-wrap:wrap;gap:2px 20px;align-items:baseline}
.attnlrp header b{font-weight:600}
.attnlrp .dim,.attnlrp figcaption{color:#59616b;color:light-dark(#59616b,#a3abb6);font-size:13px}
.attnlrp .key{display:inline-flex;gap:8px;align-items:center;margin-inline-start:auto}
.attnlrp .bar{display:inline-block;width:132px;height:10px;border-radius:5px;\
box-shadow:0 0 0 1px #c8ccd2;box-shadow:0 0 0 1px light-dark(#c8ccd2,#4a4f59)}
.attnlrp .note{margin:6px 0 0;padding-inline-start:10px;font-size:13px;border-inline-start:\
3px solid #d627a0}
.attnlrp .name{margin-top:10px}
.attnlrp .strip{margin-top:6px;line-height:2;white-space:pre-wrap;overflow-wrap:anywhere}
.attnlrp .t{position:relative;padding-block:3px;border-radius:3px;-webkit-box-decoration-break:\
clone;box-decoration-break:clone;box-shadow:inset -1px 0 #8882;forced-color-adjust:none;\
-webkit-print-color-adjust:exact;print-color-adjust:exact;cursor:default}
.attnlrp .s{font:0.8em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.attnlrp .x{background:repeating-linear-gradient(45deg,#d627a055 0 3px,transparent 3px 7px);\
color:inherit}
.attnlrp .t:hover{outline:2px solid #1f2328;outline-color:light-dark(#1f2328,#e6e8ec)}
.attnlrp .t:hover::after{content:attr(title);position:absolute;left:0;top:calc(100% + 4px);\
z-index:9;width:max-content;max-width:24em;padding:4px 8px;border-radius:5px;background:#1f2328;\
background:light-dark(#1f2328,#e6e8ec);color:#fff;color:light-dark(#fff,#16181d);\
font:13px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;direction:ltr;\
white-space:pre-wrap;pointer-events:none}
@supports (position-area:bottom){.attnlrp .t:hover{anchor-name:--attnlrp;position:static}\
.attnlrp .t:hover::after{position:fixed;left:auto;top:auto;margin-block:4px;\
position-anchor:--attnlrp;position-area:bottom span-right;\
position-try-fallbacks:flip-inline,flip-block,flip-inline flip-block}}
.attnlrp .matrix{overflow-x:auto;margin-top:6px}
.attnlrp table{border-collapse:collapse;font-size:13px;line-height:1.3;white-space:pre}
.attnlrp tbody th{font-weight:400;text-align:end;padding:0 8px;position:sticky;left:0;\
background:#fff;background:light-dark(#fff,#1b1d22)}
.attnlrp thead th{font-weight:400;vertical-align:bottom;padding:4px 0}
.attnlrp thead span{writing-mode:vertical-rl;transform:rotate(180deg)}
.attnlrp td{min-width:22px;height:22px;padding:0}
.attnlrp figure{margin:10px 0 0}
.attnlrp img{display:block;image-rendering:pixelated;max-width:100%;box-shadow:0 0 0 1px #c8ccd2;\
box-shadow:0 0 0 1px light-dark(#c8ccd2,#4a4f59);-webkit-print-color-adjust:exact;\
print-color-adjust:exact}
.attnlrp .tiles{display:flex;flex-wrap:wrap;gap:12px 16px}
.attnlrp .tile{flex:none;max-width:100%;break-inside:avoid}
.attnlrp .tile .name{margin:0 0 4px;font-size:13px;font-weight:600}
.attnlrp .tile .dim{margin-top:3px}
.attnlrp .tile .key{margin:2px 0 0}
.attnlrp .tile .bar{width:72px}
.attnlrp figcaption{display:flex;flex-wrap:wrap;gap:2px 20px;margin-bottom:6px}
@media print{.attnlrp{color-scheme:light;max-width:none}.attnlrp .bar\
{-webkit-print-color-adjust:exact;print-color-adjust:exact}.attnlrp h4,\
.attnlrp header{break-after:avoid}.attnlrp figure{break-inside:avoid}}
@media print,(prefers-contrast:more){.attnlrp [class*=" n"]:not(.n1,.n2,.n3)\
{text-decoration:underline dotted 2px;text-underline-offset:3px}}"""


def _both(light: RGB, dark: RGB) -> str:
    return f"light-dark({hex_colour(light)},{hex_colour(dark)})"


@cache
def stylesheet() -> str:
    """CSS for `html_fragment`, scoped to ``.attnlrp``.

    ``light-dark()`` follows the page's colour scheme; notebooks that have a theme of their own say
    so in an attribute or class of the body. Browsers without it get the light colours.
    """
    rules = [_LAYOUT]
    for step in range(-STEPS, STEPS + 1):
        light, dark = (palette.colour(step / STEPS) for palette in (LIGHT, DARK))
        rules.append(
            f".attnlrp .{css_class(step)}{{background:{hex_colour(light)};"
            f"background:{_both(light, dark)};color:{hex_colour(ink(light))};"
            f"color:{_both(ink(light), ink(dark))}}}"
        )
    light_bar = ",".join(map(hex_colour, LIGHT.stops))
    bar = ",".join(_both(a, b) for a, b in zip(LIGHT.stops, DARK.stops, strict=True))
    rules.append(
        f".attnlrp .bar{{background:linear-gradient(90deg,{light_bar});"
        f"background:linear-gradient(90deg,{bar})}}"
    )
    below, above = (",".join(map(str, colour)) for colour in OVERLAY)
    rules.append(
        f".attnlrp .bar.over{{background:linear-gradient(90deg,rgb({below}),rgba({below},0) 50%,"
        f"rgba({above},0) 50%,rgb({above}))}}"
    )
    return "\n".join(rules)


def css_class(step: int | None) -> str:
    if step is None:
        return "x"
    return f"n{-step}" if step < 0 else f"p{step}"
