"""The benchmark of long tails: both sides draw the same samples, and what is counted is what ran."""

from __future__ import annotations

import re

import long_tail
import pytest


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_both_sides_draw_the_same_and_steps_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(long_tail, "LONGEST", 40)
    monkeypatch.setattr(long_tail, "ENDS", tuple(range(long_tail.VOCABULARY // 20)))
    monkeypatch.setattr("sys.argv", ["long_tail", "--prompts=16", "--rows=2", "--layers=1", "--width=64", "--turns=1"])
    long_tail.main()
    text = capsys.readouterr().out
    assert len(re.findall("0 of 16 samples differ", text)) == 2
    lines = [re.search(rf"\| {name} .* (\d+) \| (\d+) \|", text) for name in ("fixed", "refill")]
    (fixed, read), (refill, again) = (map(int, line.groups()) for line in lines)
    assert 0 < refill < fixed <= 8 * 40 and fixed % 8 == refill % 8 == 0
    assert read == again == 16
