"""The stylesheet stays within what is drawn."""

import re

from attnlrp_fx.heatmap.stylesheet import stylesheet


def test_styles_reach_nothing_outside():
    for rule in re.sub(r"@(media|supports)[^{]*\{", "", stylesheet()).split("}"):
        selectors = rule.partition("{")[0].strip()
        for selector in re.split(r",(?![^()]*\))", selectors) if selectors else ():
            assert ".attnlrp" in selector, selector
